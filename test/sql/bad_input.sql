--
-- Wrong input is refused where it is given, with its reason and with the
-- command that repairs it.
--
-- The peer of every pair here is this very database.
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS mmrepl_bgw;
SET client_min_messages = notice;
\pset format unaligned
\pset tuples_only on

-- Runs a command; says how it was refused, or that it was not.  In either case
-- nothing of it stays.
CREATE FUNCTION refused(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	code text;
	message text;
	detail text;
	hint text;
	context text;
	report text;
BEGIN
	EXECUTE command;
	RAISE EXCEPTION USING ERRCODE = 'RG000', MESSAGE = 'accepted';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
		detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT,
		context = PG_EXCEPTION_CONTEXT;
	report := code || ': ' || message;
	IF detail <> '' THEN
		report := report || E'\nDETAIL: ' || detail;
	END IF;
	IF hint <> '' THEN
		report := report || E'\nHINT: ' || hint;
	END IF;

	-- What is below is this function's own.
	context := regexp_replace(context,
		'(^|\n)(SQL statement "|PL/pgSQL function refused).*', '');
	IF context <> '' THEN
		report := report || E'\nCONTEXT: ' || context;
	END IF;

	-- Names that depend on the installation, and ids that depend on what was
	-- tried before.
	report := regexp_replace(report, '\m' || session_user || '\M', 'SUPERUSER', 'g');
	RETURN regexp_replace(report, '\mpair \d+', 'pair ID', 'g');
END$$;

-- CREATE SERVER to this server's own socket.
CREATE FUNCTION loopback(name text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	socket text := split_part(current_setting('unix_socket_directories'), ',', 1);
BEGIN
	EXECUTE format('CREATE SERVER %I FOREIGN DATA WRAPPER mmrepl_fdw
		OPTIONS (host %L, port %L, dbname %L)', name,
		CASE WHEN socket = '' THEN 'localhost' ELSE socket END,
		current_setting('port'), current_database());
END$$;

CREATE ROLE regress_mmrepl_owner;
CREATE ROLE regress_mmrepl_other;
GRANT CREATE ON SCHEMA public TO regress_mmrepl_owner;
GRANT EXECUTE ON FUNCTION refused(text) TO PUBLIC;

SELECT loopback('loop');
SELECT loopback('unmapped');
SELECT loopback('locked');
CREATE SERVER nohost FOREIGN DATA WRAPPER mmrepl_fdw
  OPTIONS (host '/mmrepl/no/such/directory', port '1', dbname 'postgres');
DO $$
DECLARE
	server name;
BEGIN
	FOREACH server IN ARRAY '{loop,locked,nohost}'::name[] LOOP
		EXECUTE format('CREATE USER MAPPING FOR CURRENT_USER SERVER %I
			OPTIONS (user %L)', server, current_user);
	END LOOP;
END$$;
CREATE USER MAPPING FOR regress_mmrepl_owner SERVER loop
  OPTIONS (user 'regress_mmrepl_owner');
GRANT USAGE ON FOREIGN SERVER loop, unmapped TO regress_mmrepl_owner;

-- A table that could be replicated, and a place where it could go.
CREATE TABLE good (id int, k text, v text, n numeric(10, 2), at date,
  PRIMARY KEY (id, k));
CREATE SCHEMA there;
CREATE TABLE there.good (LIKE good INCLUDING ALL);

--
-- Servers and mappings
--
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (password 'secret')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (user 'me')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (sslpassword 'secret')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (hots 'localhost')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (wholly_unknown '1')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (replication 'true')$$);
SELECT refused($$CREATE SERVER bad FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (client_encoding 'LATIN1')$$);
SELECT refused($$CREATE USER MAPPING FOR regress_mmrepl_other SERVER loop OPTIONS (host 'localhost')$$);
SELECT refused($$CREATE USER MAPPING FOR regress_mmrepl_other SERVER loop OPTIONS (passwort 'x')$$);
SELECT refused($$CREATE FOREIGN TABLE bad (a int) SERVER loop OPTIONS (table_name 'x')$$);

SELECT refused($$SELECT mmrepl.create_pair('good', 'nowhere')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'unmapped', 'there.good')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', NULL)$$);
SELECT refused($$SELECT mmrepl.create_pair(NULL, 'loop')$$);

--
-- Rights
--
SET ROLE regress_mmrepl_owner;
CREATE TABLE owned (id int PRIMARY KEY);
SELECT refused($$SELECT mmrepl.create_pair('owned', 'locked')$$);
SELECT refused($$SELECT mmrepl.create_pair('owned', 'unmapped')$$);
SELECT refused($$SELECT mmrepl.create_pair('owned', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good')$$);
SET ROLE regress_mmrepl_other;
SELECT refused($$SELECT mmrepl.create_pair('owned', 'loop')$$);
SELECT refused($$SELECT mmrepl.allow_apply('regress_mmrepl_other')$$);
SELECT refused($$SELECT mmrepl.apply('\x00')$$);
SELECT refused($$SELECT mmrepl.pause('loop')$$);
SELECT refused($$SELECT mmrepl.skip('loop', 1, 'no right')$$);
SELECT refused($$SELECT mmrepl.stat_reset()$$);
SELECT refused($$SET mmrepl.capture = off$$);
SELECT refused($$INSERT INTO mmrepl.pair (local_table) VALUES ('owned')$$);
RESET ROLE;

--
-- The local table
--
CREATE TABLE keyless (a int, b int);
CREATE TABLE uniquely (a int NOT NULL UNIQUE, b int);
CREATE TABLE late (a int PRIMARY KEY DEFERRABLE);
CREATE TABLE unlogged_one (a int PRIMARY KEY);
ALTER TABLE unlogged_one SET UNLOGGED;
CREATE TEMPORARY TABLE temporary_one (a int PRIMARY KEY);
CREATE VIEW seen AS SELECT * FROM good;
CREATE MATERIALIZED VIEW kept AS SELECT * FROM good;
CREATE FOREIGN TABLE far (a int) SERVER loop;
CREATE SEQUENCE counting;
CREATE TYPE pieces AS (a int);
SELECT refused($$SELECT mmrepl.create_pair('missing', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('keyless', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('uniquely', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('late', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('unlogged_one', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('temporary_one', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('seen', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('kept', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('far', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('counting', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('pieces', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('good_pkey', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('pg_class', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('information_schema.sql_features', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('mmrepl.pair', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair(0, 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair(4294967295, 'loop')$$);

--
-- Columns
--
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,v}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,w}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,V}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,v,v}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,NULL}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,ctid}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{{id,k},{v,n}}')$$);

SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"w": "v"}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": "w"}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": "at"}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": "x", "n": "x"}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{id,k,n}', column_map => '{"v": "v"}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '[1, 2]')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '"v"')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => 'null')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": 1}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": null}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": ""}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', column_map => '{"v": {"x": "y"}}')$$);

--
-- The filter
--
CREATE FUNCTION rolls(int) RETURNS bool VOLATILE LANGUAGE sql AS 'SELECT random() * $1 > 1';
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'id >')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'nothing = 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'id + 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'random() > 0.5')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'rolls(id)')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'id IN (SELECT a FROM keyless)')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'EXISTS (SELECT 1)')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'count(*) > 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'row_number() OVER () = 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'generate_series(1, 2) = 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'id = $1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'xmin = 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'tableoid = 1')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'true, false')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'true); DROP TABLE good; --')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'true FROM keyless')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'true UNION SELECT false')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'other.id = 1')$$);

--
-- The remote table
--
CREATE TABLE there.short (id int, k text, v text, PRIMARY KEY (id, k));
CREATE TABLE there.typed (id int, k text, v text, n text, at date, PRIMARY KEY (id, k));
CREATE TABLE there.keytyped (id bigint, k text, v text, n numeric(10, 2), at date, PRIMARY KEY (id, k));
CREATE TABLE there.precision (id int, k text, v varchar(3), n numeric(5, 0), at date, PRIMARY KEY (id, k));
CREATE TABLE there.keyless (id int, k text, v text, n numeric(10, 2), at date);
CREATE TABLE there.otherkey (id int PRIMARY KEY, k text, v text, n numeric(10, 2), at date);
CREATE TABLE there.morekey (id int, k text, v text, n numeric(10, 2), at date, PRIMARY KEY (id, k, v));
CREATE TABLE there.demanding (id int, k text, v text, n numeric(10, 2), at date, more int NOT NULL, PRIMARY KEY (id, k));
CREATE TABLE there.generated (id int, k text, v text GENERATED ALWAYS AS (k) STORED, n numeric(10, 2), at date, PRIMARY KEY (id, k));
CREATE VIEW there.seen AS SELECT * FROM good;
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.missing')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'nowhere.good')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.short')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.typed')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.keytyped')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.precision')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.keyless')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.otherkey')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.morekey')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.demanding')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.generated')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.seen')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', '')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'a.b.c')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', '"there.good')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'There."Good"')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good; DROP TABLE good')$$);
-- itself, under either name
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'public.good')$$);

--
-- The other options
--
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', mode => 'fast')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', mode => 'SYNC')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', mode => NULL)$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', conflict_resolution => 'latest')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', on_unreachable => 'ignore')$$);

--
-- What looks like it, and is not wrong: an empty list means all columns, an
-- empty filter means all rows, a filter may be stable, and a server that cannot
-- be reached now may come back.
--
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', columns => '{}')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => '')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good', row_filter => 'at = current_date')$$);
SELECT refused($$SELECT mmrepl.create_pair('good', 'nohost', 'there.good')$$);
-- one that is there, but without the database or the role, does not
CREATE SERVER nodatabase FOREIGN DATA WRAPPER mmrepl_fdw OPTIONS (dbname 'regress_mmrepl_nowhere');
SELECT left(refused(format($$ALTER SERVER nodatabase OPTIONS (ADD host %L, ADD port %L);
	CREATE USER MAPPING FOR CURRENT_USER SERVER nodatabase OPTIONS (user %L);
	SELECT mmrepl.create_pair('good', 'nodatabase', 'there.good')$$,
	split_part(current_setting('unix_socket_directories'), ',', 1), current_setting('port'),
	current_user)), 5) AS sqlstate;
DROP SERVER nodatabase;

-- Nothing of all this has made a pair or left a trigger behind.
SELECT count(*) FROM mmrepl.pairs;
SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal;

--
-- Pairs that are there, or are not
--
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', mode => 'sync')$$);
SELECT refused($$SELECT mmrepl.drop_pair('good', 'loop')$$);
SELECT mmrepl.create_pair('good', 'loop', 'there.good') > 0;
SELECT refused($$SELECT mmrepl.create_pair('good', 'loop', 'there.good')$$);
SELECT refused($$SELECT mmrepl.drop_pair('good', 'nowhere')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', mode => 'fast')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', columns => '{id,v}')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', column_map => '{"v": "w"}')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', row_filter => 'random() > 0.5')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', remote_table => 'there.missing')$$);
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', remote_table => 'public.good')$$);
SET ROLE regress_mmrepl_other;
SELECT refused($$SELECT mmrepl.alter_pair('good', 'loop', mode => 'sync')$$);
SELECT refused($$SELECT mmrepl.drop_pair('good', 'loop')$$);
RESET ROLE;
SELECT mode, columns, column_map, row_filter, remote_table FROM mmrepl.pairs;

-- What a pair needs does not go away from under it.
DROP VIEW seen, there.seen;
DROP MATERIALIZED VIEW kept;
SELECT refused($$ALTER TABLE good DROP COLUMN k$$);
SELECT refused($$ALTER TABLE good DROP CONSTRAINT good_pkey$$);
SELECT refused($$ALTER TABLE good SET UNLOGGED$$);
SELECT mmrepl.alter_pair('good', 'loop', row_filter => 'n > 0');
SELECT refused($$ALTER TABLE good DROP COLUMN n$$);

--
-- Triggers made by hand
--
CREATE TABLE hand (id int PRIMARY KEY, v text);
CREATE TABLE there.hand (LIKE hand INCLUDING ALL);
CREATE VIEW hand_view AS SELECT * FROM hand;
SELECT refused($$SELECT mmrepl.replicate()$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate(); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async', 'more'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'fast'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('nowhere', 'there', 'hand', 'app', 'async'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('unmapped', 'there', 'hand', 'app', 'async'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'public', 'hand', 'app', 'async'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t BEFORE INSERT ON hand FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON hand FOR EACH STATEMENT
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async'); INSERT INTO hand VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t BEFORE TRUNCATE ON hand FOR EACH STATEMENT
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async'); TRUNCATE hand$$);
SELECT refused($$CREATE TRIGGER t INSTEAD OF INSERT ON hand_view FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async'); INSERT INTO hand_view VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON keyless FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'keyless', 'app', 'async'); INSERT INTO keyless VALUES (1)$$);
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON temporary_one FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('loop', 'there', 'hand', 'app', 'async'); INSERT INTO temporary_one VALUES (1)$$);
SET ROLE regress_mmrepl_owner;
SELECT refused($$CREATE TRIGGER t AFTER INSERT ON owned FOR EACH ROW
  EXECUTE FUNCTION mmrepl.replicate('locked', 'there', 'owned', 'app', 'async'); INSERT INTO owned VALUES (1)$$);
RESET ROLE;
SELECT count(*) FROM hand;

--
-- Functions for operators
--
SELECT refused($$SELECT mmrepl.pause('nowhere')$$);
SELECT refused($$SELECT mmrepl.resume('nowhere')$$);
SELECT refused($$SELECT mmrepl.retry_now('nowhere')$$);
SELECT refused($$SELECT mmrepl.wait_for_replay('nowhere')$$);
SELECT refused($$SELECT mmrepl.stat_reset('nowhere')$$);
SELECT refused($$SELECT mmrepl.skip('nowhere', 1, 'reason')$$);
SELECT refused($$SELECT mmrepl.skip('loop', 1, 'reason')$$);
SELECT refused($$SELECT mmrepl.skip('loop', 1, '')$$);
SELECT refused($$SELECT mmrepl.deal_sync_err_rec(0)$$);
SELECT refused($$SELECT mmrepl.deal_sync_err_rec(-1)$$);
SELECT refused($$SELECT mmrepl.allow_apply('regress_mmrepl_nobody')$$);
SELECT refused($$SELECT mmrepl.apply('')$$);
SELECT refused($$SELECT mmrepl.apply('\x00')$$);
SELECT refused($$SELECT mmrepl.apply(decode(repeat('ff', 1000), 'hex'))$$);
SELECT refused($$SELECT mmrepl.apply('INSERT INTO good VALUES (1)')$$);

--
-- Settings
--
SELECT refused($$SET mmrepl.mode = 'fast'$$);
SELECT refused($$SET mmrepl.sync_flush = 'never'$$);
SELECT refused($$SET mmrepl.no_such_setting = 1$$);
SELECT refused($$SET mmrepl.max_servers = 1$$);

-- Clean up.
SET client_min_messages = warning;
SELECT mmrepl.drop_pair('good', 'loop');
DROP TABLE good, owned, keyless, uniquely, late, unlogged_one, hand CASCADE;
DROP SCHEMA there CASCADE;
DROP SEQUENCE counting;
DROP TYPE pieces;
DROP FUNCTION rolls(int);
DROP FOREIGN TABLE far;
DROP SERVER loop, unmapped, locked, nohost CASCADE;
DROP FUNCTION refused(text), loopback(text);
REVOKE ALL ON SCHEMA public FROM regress_mmrepl_owner;
DROP ROLE regress_mmrepl_owner, regress_mmrepl_other;
