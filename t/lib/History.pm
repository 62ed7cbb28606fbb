# History.pm
#		Each node writes down every row that is written there, by whomever; the
#		histories of two nodes are compared afterwards.
#
# NOTES
#		A trigger that fires always records table, key, operation and the token of
#		the row version.  Its number is drawn while the writer holds the row, so
#		the numbers of one row are in the order of its versions, at the source as
#		well as at the peer.  Equal histories of each row mean: nothing lost,
#		nothing doubled, nothing reordered.

=pod

=head1 NAME

History - what was written at each node, and whether it was the same

=head1 SYNOPSIS

  History::install($_, 'item', 'other') foreach ($alpha, $beta);
  ...
  History::same($alpha, $beta, 'after the crash');

=head1 FUNCTIONS

=over

=cut

package History;

use strict;
use warnings;

use Test::More;

=pod

=item History::install($node, @tables)

Makes the table history and the triggers.  Each table needs columns id (of an
integer type) and token (text).

=cut

sub install
{
	my ($node, @tables) = @_;

	$node->safe_psql(
		'postgres', q{
		CREATE TABLE history (n bigserial PRIMARY KEY, xid xid8 NOT NULL,
			tbl name NOT NULL, key bigint, op text NOT NULL, token text);
		CREATE FUNCTION note_write() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF TG_OP = 'TRUNCATE' THEN
				INSERT INTO public.history (xid, tbl, op)
				VALUES (pg_current_xact_id(), TG_TABLE_NAME, 'T');
				RETURN NULL;
			END IF;
			IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE' AND OLD.id <> NEW.id THEN
				INSERT INTO public.history (xid, tbl, key, op, token)
				VALUES (pg_current_xact_id(), TG_TABLE_NAME, OLD.id,
						CASE TG_OP WHEN 'DELETE' THEN 'D' ELSE '-' END, OLD.token);
			END IF;
			IF TG_OP <> 'DELETE' THEN
				INSERT INTO public.history (xid, tbl, key, op, token)
				VALUES (pg_current_xact_id(), TG_TABLE_NAME, NEW.id,
						CASE WHEN TG_OP = 'INSERT' THEN 'I'
							 WHEN OLD.id <> NEW.id THEN '+' ELSE 'U' END, NEW.token);
			END IF;
			RETURN NULL;
		END $$;
	});
	foreach my $table (@tables)
	{
		$node->safe_psql(
			'postgres', qq{
			CREATE TRIGGER note_write AFTER INSERT OR UPDATE OR DELETE ON $table
			  FOR EACH ROW EXECUTE FUNCTION note_write();
			CREATE TRIGGER note_truncate AFTER TRUNCATE ON $table
			  FOR EACH STATEMENT EXECUTE FUNCTION note_write();
			ALTER TABLE $table ENABLE ALWAYS TRIGGER note_write,
			  ENABLE ALWAYS TRIGGER note_truncate;
		});
	}
	return;
}

=pod

=item History::forget(@nodes)

Empties the histories.

=cut

sub forget
{
	$_->safe_psql('postgres', 'TRUNCATE history') foreach @_;
	return;
}

# For each row that was ever written its versions, in order.  What TRUNCATE
# removed stands in the line of every row that the table had had before.
sub fetch_per_key
{
	my ($node) = @_;
	my %versions;
	my %keys_of;

	foreach my $line (
		split /\n/,
		$node->safe_psql(
			'postgres', q{SELECT tbl, coalesce(key::text, ''), op || coalesce(token, '')
						  FROM history ORDER BY n}))
	{
		my ($table, $key, $version) = split /\|/, $line, 3;

		$keys_of{$table}->{"$table $key"} = 1;
		push @{ $versions{$_} }, $version
		  foreach ($key eq '' ? keys %{ $keys_of{$table} } : "$table $key");
	}
	return { map { $_ => join(' ', @{ $versions{$_} }) } keys %versions };
}

=pod

=item History::same($one, $other, $name)

Passes (as a test) if every row has had the same versions in the same order on
both nodes.

=cut

sub same
{
	my ($one, $other, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($here, $there) = map { fetch_per_key($_) } ($one, $other);
	my %all = (%$here, %$there);
	my @different =
	  grep { ($here->{$_} // '') ne ($there->{$_} // '') } sort keys %all;

	ok(!@different, $name) and return 1;
	diag(scalar(@different) . ' of ' . scalar(keys %all) . ' rows differ');
	foreach my $key (@different[ 0 .. (@different > 5 ? 4 : $#different) ])
	{
		diag("$key\n  "
			  . $one->name . ': ' . abridged($here->{$key}, $there->{$key})
			  . "\n  "
			  . $other->name . ': ' . abridged($there->{$key}, $here->{$key}));
	}
	return 0;
}

# The versions from shortly before the first difference on.
sub abridged
{
	my ($versions, $others) = map { [ split / /, $_ // 'none' ] } @_;
	my $first = 0;

	$first++
	  while $first < @$versions
	  && $first < @$others
	  && $versions->[$first] eq $others->[$first];
	my $from = $first > 3 ? $first - 3 : 0;
	my $to = $from + 9 > $#$versions ? $#$versions : $from + 9;
	return "(from $from of " . @$versions . ') '
	  . join(' ', @$versions[ $from .. $to ]);
}

=pod

=item History::transactions($node)

What each transaction wrote, in order: a reference to an array of references to
arrays of "table key operation token".  Ordered by the transactions' last write.

=cut

sub transactions
{
	my ($node) = @_;
	my (%writes, @order);

	foreach my $line (
		split /\n/,
		$node->safe_psql(
			'postgres', q{SELECT xid, concat_ws(' ', tbl, key, op, token)
						  FROM history ORDER BY n}))
	{
		my ($xid, $write) = split /\|/, $line, 2;

		push @{ $writes{$xid} }, $write;
		push @order, [ $xid, $write ];
	}
	return (\%writes, \@order);
}

=pod

=back

=cut

1;
