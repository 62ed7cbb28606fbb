/* sql/mmrepl_bgw.sql: the whole of the current version; steps from older versions stand beside it */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION mmrepl_bgw" to load this file. \quit

/*
 * A schema that somebody prepared could hold objects that ours would trip over,
 * and its owner could drop them: it must belong to a superuser.
 */
DO $$
DECLARE
	schema_owner pg_catalog.name;
BEGIN
	SELECT r.rolname INTO schema_owner
	  FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles r ON r.oid = n.nspowner
	 WHERE n.nspname = 'mmrepl' AND NOT r.rolsuper;
	IF FOUND THEN
		RAISE EXCEPTION 'schema "mmrepl" belongs to "%", which is no superuser', schema_owner
			USING ERRCODE = 'insufficient_privilege',
				  HINT = 'ALTER SCHEMA mmrepl OWNER TO CURRENT_USER, after a look at what is in it.';
	END IF;
END
$$;

GRANT USAGE ON SCHEMA mmrepl TO PUBLIC;

COMMENT ON SCHEMA mmrepl IS 'multi-master replication of tables (extension mmrepl_bgw)';


/* ---- Tables ---- */

/*
 * Who this database is.  system_identifier and database tell a copy (CREATE
 * DATABASE ... TEMPLATE, a restored base backup's sibling) from the original.
 */
CREATE TABLE mmrepl.node
(
	node_id uuid NOT NULL,
	system_identifier bigint NOT NULL,
	database oid NOT NULL
);

COMMENT ON TABLE mmrepl.node IS 'identity of this database as a node; one row';
COMMENT ON COLUMN mmrepl.node.node_id IS 'the name under which peers know what was written here';
COMMENT ON COLUMN mmrepl.node.system_identifier IS 'system identifier of the server that the row was made for';
COMMENT ON COLUMN mmrepl.node.database IS 'OID of the database that the row was made for';

INSERT INTO mmrepl.node (node_id, system_identifier, database)
SELECT pg_catalog.gen_random_uuid(), s.system_identifier, d.oid
  FROM pg_catalog.pg_control_system() s, pg_catalog.pg_database d
 WHERE d.datname = pg_catalog.current_database();

/*
 * A pair: a local table and the table that its changes go to.  Written by
 * create_pair(), alter_pair(), drop_pair() only; they keep the triggers in step.
 */
CREATE SEQUENCE mmrepl.pair_id_seq AS integer;

CREATE TABLE mmrepl.pair
(
	pair_id integer NOT NULL DEFAULT pg_catalog.nextval('mmrepl.pair_id_seq'),
	local_table regclass NOT NULL,
	server name NOT NULL,
	owner regrole NOT NULL,
	remote_schema name NOT NULL,
	remote_table name NOT NULL,
	mode text NOT NULL CHECK (mode IN ('async', 'sync')),
	columns name[],
	column_map jsonb,
	row_filter text,
	conflict_resolution text NOT NULL
		CHECK (conflict_resolution IN ('apply_remote', 'keep_local', 'error')),
	on_unreachable text NOT NULL CHECK (on_unreachable IN ('error', 'queue')),
	enabled boolean NOT NULL DEFAULT true,
	CONSTRAINT pair_pkey PRIMARY KEY (pair_id),
	CONSTRAINT pair_by_table UNIQUE (local_table, server)
);

ALTER SEQUENCE mmrepl.pair_id_seq OWNED BY mmrepl.pair.pair_id;

COMMENT ON SEQUENCE mmrepl.pair_id_seq IS 'ids of pairs';
COMMENT ON TABLE mmrepl.pair IS 'pairs of a local table and a remote one; use create_pair(), alter_pair(), drop_pair()';
COMMENT ON COLUMN mmrepl.pair.owner IS 'the role whose user mapping connects to the server';
COMMENT ON COLUMN mmrepl.pair.columns IS 'local columns that are replicated; NULL: all';
COMMENT ON COLUMN mmrepl.pair.column_map IS 'object of local to remote column names that differ';
COMMENT ON COLUMN mmrepl.pair.row_filter IS 'boolean expression over the local row; NULL: every row';

/*
 * Pairs are configuration: pg_dump carries them.  All below is state of this very
 * database.  Who owns the database can dump it; what he reads for that stands in the
 * view pairs, too, which everybody may read.
 */
SELECT pg_catalog.pg_extension_config_dump('mmrepl.pair', '');
SELECT pg_catalog.pg_extension_config_dump('mmrepl.pair_id_seq', '');
GRANT SELECT ON mmrepl.pair, mmrepl.pair_id_seq TO pg_database_owner;

/*
 * A stream: what is delivered in order, by one worker.  One HOT update a batch,
 * hence the low fillfactor and the early vacuum.
 */
CREATE SEQUENCE mmrepl.stream_id_seq AS integer;

CREATE TABLE mmrepl.stream
(
	stream_id integer NOT NULL DEFAULT pg_catalog.nextval('mmrepl.stream_id_seq'),
	server oid NOT NULL,
	owner oid NOT NULL,
	paused boolean NOT NULL DEFAULT false,
	confirmed bigint NOT NULL DEFAULT 0,
	server_name name NOT NULL,
	acked bigint NOT NULL DEFAULT 0,
	discarded bigint NOT NULL DEFAULT 0,
	resync_since timestamptz,
	resync_reason text,
	CONSTRAINT stream_pkey PRIMARY KEY (stream_id),
	CONSTRAINT stream_by_key UNIQUE (server, owner)
) WITH (fillfactor = 10, vacuum_truncate = off,
		autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0,
		autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_threshold = 2000000000);

ALTER SEQUENCE mmrepl.stream_id_seq OWNED BY mmrepl.stream.stream_id;

COMMENT ON SEQUENCE mmrepl.stream_id_seq IS 'ids of streams';
COMMENT ON TABLE mmrepl.stream IS 'streams: a foreign server and the role whose user mapping is used';
COMMENT ON COLUMN mmrepl.stream.server IS 'OID of the foreign server';
COMMENT ON COLUMN mmrepl.stream.owner IS 'OID of the role that owns the pairs';
COMMENT ON COLUMN mmrepl.stream.paused IS 'whether pause() was called';
COMMENT ON COLUMN mmrepl.stream.confirmed IS 'all work up to this ticket is at the peer, as last written; the peer may be further';
COMMENT ON COLUMN mmrepl.stream.acked IS 'watermark that the peer has reported at least: a peer that reports less was restored from an older state';
COMMENT ON COLUMN mmrepl.stream.discarded IS 'what was queued up to this ticket is not delivered any more: resync() copied the tables anew';
COMMENT ON COLUMN mmrepl.stream.resync_since IS 'since when nothing is queued, because too much was waiting; see resync(); NULL: all is well';
COMMENT ON COLUMN mmrepl.stream.resync_reason IS 'what happened then';
COMMENT ON COLUMN mmrepl.stream.server_name IS 'the server''s name as last seen: outlives a dropped server and pg_upgrade';

/*
 * The queue: three append-only heaps that take turns, each emptied by TRUNCATE
 * when every stream has passed it.  No index, and no TOAST table: a row is a
 * segment of at most 8000 bytes, stored plain.  CREATE TABLE of PostgreSQL 15
 * has no STORAGE clause and would make a TOAST table, LIKE does not.
 */
CREATE TABLE mmrepl.queue_template
(
	ticket bigint NOT NULL,
	xid bigint NOT NULL,
	stream integer NOT NULL,
	flags smallint NOT NULL,
	seq bigint,
	changes integer,
	payload bytea NOT NULL
);
ALTER TABLE mmrepl.queue_template ALTER COLUMN payload SET STORAGE PLAIN;

CREATE TABLE mmrepl.queue_0 (LIKE mmrepl.queue_template INCLUDING STORAGE)
	WITH (vacuum_truncate = off, autovacuum_vacuum_insert_threshold = -1,
		  autovacuum_vacuum_threshold = 2000000000, autovacuum_analyze_threshold = 2000000000);
CREATE TABLE mmrepl.queue_1 (LIKE mmrepl.queue_template INCLUDING STORAGE)
	WITH (vacuum_truncate = off, autovacuum_vacuum_insert_threshold = -1,
		  autovacuum_vacuum_threshold = 2000000000, autovacuum_analyze_threshold = 2000000000);
CREATE TABLE mmrepl.queue_2 (LIKE mmrepl.queue_template INCLUDING STORAGE)
	WITH (vacuum_truncate = off, autovacuum_vacuum_insert_threshold = -1,
		  autovacuum_vacuum_threshold = 2000000000, autovacuum_analyze_threshold = 2000000000);

DROP TABLE mmrepl.queue_template;

COMMENT ON TABLE mmrepl.queue_0 IS 'captured changes on their way, encoded; read mmrepl.sync_err_rec instead';
COMMENT ON TABLE mmrepl.queue_1 IS 'captured changes on their way, encoded; read mmrepl.sync_err_rec instead';
COMMENT ON TABLE mmrepl.queue_2 IS 'captured changes on their way, encoded; read mmrepl.sync_err_rec instead';

/* The receiver's side: what of each peer's stream has been applied here. */
CREATE TABLE mmrepl.progress
(
	origin uuid NOT NULL,
	stream integer NOT NULL,
	watermark bigint NOT NULL,
	applied_at timestamptz NOT NULL,
	conflicts bigint NOT NULL DEFAULT 0,
	CONSTRAINT progress_pkey PRIMARY KEY (origin, stream)
) WITH (fillfactor = 10, vacuum_truncate = off,
		autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0,
		autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_threshold = 2000000000);

COMMENT ON TABLE mmrepl.progress IS 'how far the streams of peers have been applied here';
COMMENT ON COLUMN mmrepl.progress.origin IS 'node id of the peer';
COMMENT ON COLUMN mmrepl.progress.stream IS 'stream id at the peer';
COMMENT ON COLUMN mmrepl.progress.watermark IS 'every transaction of the stream with a ticket up to this one is applied';
COMMENT ON COLUMN mmrepl.progress.applied_at IS 'when the watermark last moved';
COMMENT ON COLUMN mmrepl.progress.conflicts IS 'conflicts met while applying the stream';

/* Transactions that were applied outside of their stream's order; swept by later batches. */
CREATE TABLE mmrepl.marker
(
	origin uuid NOT NULL,
	stream integer NOT NULL,
	xid bigint NOT NULL,
	CONSTRAINT marker_pkey PRIMARY KEY (origin, stream, xid)
) WITH (vacuum_truncate = off,
		autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0,
		autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 2000000000);

COMMENT ON TABLE mmrepl.marker IS 'transactions of peers that were applied inline (sync): never apply them again';

CREATE TABLE mmrepl.skipped
(
	server name NOT NULL,
	ticket bigint NOT NULL,
	xid bigint NOT NULL,
	changes bigint NOT NULL,
	queries text[] NOT NULL,
	reason text NOT NULL,
	skipped_by name NOT NULL,
	skipped_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	stream integer
);

COMMENT ON TABLE mmrepl.skipped IS 'queued transactions that skip() dropped, and who did it and why';


/* ---- Pairs ---- */

CREATE FUNCTION mmrepl.replicate() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_replicate';
COMMENT ON FUNCTION mmrepl.replicate() IS
	'capture changes of a table; made by create_pair(), or by hand with (server, schema, table, application_name, mode)';

CREATE FUNCTION mmrepl.create_pair(
	local_table regclass,
	server name,
	remote_table text DEFAULT NULL,
	mode text DEFAULT 'async',
	columns name[] DEFAULT NULL,
	column_map jsonb DEFAULT NULL,
	row_filter text DEFAULT NULL,
	conflict_resolution text DEFAULT 'apply_remote',
	on_unreachable text DEFAULT 'error',
	copy_data boolean DEFAULT false)
	RETURNS integer
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_create_pair';
COMMENT ON FUNCTION mmrepl.create_pair(regclass, name, text, text, name[], jsonb, text, text, text, boolean) IS
	'replicate a table to a server; returns the id of the pair';

CREATE FUNCTION mmrepl.alter_pair(
	local_table regclass,
	server name,
	remote_table text DEFAULT NULL,
	mode text DEFAULT NULL,
	columns name[] DEFAULT NULL,
	column_map jsonb DEFAULT NULL,
	row_filter text DEFAULT NULL,
	conflict_resolution text DEFAULT NULL,
	on_unreachable text DEFAULT NULL,
	copy_data boolean DEFAULT NULL,
	enabled boolean DEFAULT NULL)
	RETURNS void
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_alter_pair';
COMMENT ON FUNCTION mmrepl.alter_pair(regclass, name, text, text, name[], jsonb, text, text, text, boolean, boolean) IS
	'change options of a pair; NULL leaves an option as it is';

CREATE FUNCTION mmrepl.drop_pair(local_table regclass, server name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_drop_pair';
COMMENT ON FUNCTION mmrepl.drop_pair(regclass, name) IS 'replicate a table to a server no more';

CREATE VIEW mmrepl.pairs AS
SELECT p.pair_id,
	   p.local_table,
	   p.server,
	   pg_catalog.format('%I.%I', p.remote_schema, p.remote_table) AS remote_table,
	   p.mode,
	   p.columns,
	   p.column_map,
	   p.row_filter,
	   p.conflict_resolution,
	   p.on_unreachable,
	   p.enabled,
	   p.owner
  FROM mmrepl.pair p;

COMMENT ON VIEW mmrepl.pairs IS 'pairs of a local table and a remote one, and their options';

GRANT SELECT ON mmrepl.pairs TO PUBLIC;


/* ---- The foreign-data wrapper, which only checks options ---- */

CREATE FUNCTION mmrepl.fdw_validator(options text[], catalog oid) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_fdw_validator';
COMMENT ON FUNCTION mmrepl.fdw_validator(text[], oid) IS 'check options of servers and user mappings of mmrepl_fdw';

CREATE FOREIGN DATA WRAPPER mmrepl_fdw VALIDATOR mmrepl.fdw_validator;
COMMENT ON FOREIGN DATA WRAPPER mmrepl_fdw IS 'peers of mmrepl_bgw';


/* ---- The receiver ---- */

CREATE FUNCTION mmrepl.apply(batch bytea) RETURNS bigint
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_apply';
COMMENT ON FUNCTION mmrepl.apply(bytea) IS 'apply a peer''s batch of changes; returns the watermark after it';

CREATE FUNCTION mmrepl.hello(
	origin uuid,
	origin_stream integer,
	client_protocol integer,
	OUT protocol integer,
	OUT node uuid,
	OUT watermark bigint,
	OUT server_version integer)
	RETURNS record
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_hello';
COMMENT ON FUNCTION mmrepl.hello(uuid, integer, integer) IS
	'greeting of a peer: agree on the protocol and tell how far its stream has been applied';

CREATE FUNCTION mmrepl.allow_apply(role_name name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_allow_apply';
COMMENT ON FUNCTION mmrepl.allow_apply(name) IS 'grant a role what a peer''s user mapping needs here';

CREATE FUNCTION mmrepl.disallow_apply(role_name name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_disallow_apply';
COMMENT ON FUNCTION mmrepl.disallow_apply(name) IS 'take back what allow_apply() granted';

REVOKE ALL ON FUNCTION mmrepl.apply(bytea) FROM PUBLIC;
REVOKE ALL ON FUNCTION mmrepl.hello(uuid, integer, integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION mmrepl.allow_apply(name) FROM PUBLIC;
REVOKE ALL ON FUNCTION mmrepl.disallow_apply(name) FROM PUBLIC;

GRANT SELECT ON mmrepl.progress TO pg_monitor;


/* ---- The node ---- */

CREATE FUNCTION mmrepl.node_id() RETURNS uuid
	LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'mmrepl_node_id';
COMMENT ON FUNCTION mmrepl.node_id() IS 'the id of this database as a node';

CREATE FUNCTION mmrepl.adopt_node(moved boolean DEFAULT false, force boolean DEFAULT false) RETURNS uuid
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_adopt_node';
COMMENT ON FUNCTION mmrepl.adopt_node(boolean, boolean) IS
	'let a copied database replicate: as a new node without the original''s queue, or, when moved, in the original''s place';

REVOKE ALL ON FUNCTION mmrepl.adopt_node(boolean, boolean) FROM PUBLIC;


/* ---- The queue ---- */

CREATE FUNCTION mmrepl.queued_changes(
	OUT id bigint,
	OUT nsp_name name,
	OUT table_name name,
	OUT dst_server text,
	OUT dst_query text,
	OUT create_time timestamptz,
	OUT ticket bigint,
	OUT xid bigint,
	OUT op text,
	OUT state text,
	OUT pair_id integer)
	RETURNS SETOF record
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_queued_changes';
COMMENT ON FUNCTION mmrepl.queued_changes() IS
	'changes that their targets have not confirmed, as far as the caller may see them';

CREATE VIEW mmrepl.sync_err_rec AS
SELECT q.id,
	   q.nsp_name,
	   q.table_name,
	   q.dst_server,
	   q.dst_query,
	   q.create_time,
	   q.ticket,
	   q.xid,
	   q.op,
	   q.state,
	   q.pair_id
  FROM mmrepl.queued_changes() q;

COMMENT ON VIEW mmrepl.sync_err_rec IS 'changes that their targets have not confirmed, as SQL';

GRANT SELECT ON mmrepl.sync_err_rec TO PUBLIC;

CREATE FUNCTION mmrepl.deal_sync_err_rec(i_limit integer) RETURNS boolean
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_deal_sync_err_rec';
COMMENT ON FUNCTION mmrepl.deal_sync_err_rec(integer) IS
	'deliver at most that many queued changes now; true when nothing went wrong';

CREATE FUNCTION mmrepl.wait_for_replay(server name, timeout interval DEFAULT '1 min') RETURNS boolean
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_wait_for_replay';
COMMENT ON FUNCTION mmrepl.wait_for_replay(name, interval) IS
	'wait until all that was committed here before is committed there; false when it took too long';

CREATE FUNCTION mmrepl.pause(server name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_pause';
COMMENT ON FUNCTION mmrepl.pause(name) IS 'stop delivery to a server; changes queue up';

CREATE FUNCTION mmrepl.resume(server name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_resume';
COMMENT ON FUNCTION mmrepl.resume(name) IS 'go on with delivery to a server after pause()';

CREATE FUNCTION mmrepl.accept_peer(server name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_accept_peer';
COMMENT ON FUNCTION mmrepl.accept_peer(name) IS 'go on with a peer that was restored from an older state, or replaced, from where it stands: its tables have been brought up to date';

CREATE FUNCTION mmrepl.resync(server name, truncate boolean DEFAULT false, force boolean DEFAULT false) RETURNS bigint
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_resync';
COMMENT ON FUNCTION mmrepl.resync(name, boolean, boolean) IS
	'queue again for a server that needs a resync, beginning with a copy of every table; returns the number of rows';

CREATE FUNCTION mmrepl.retry_now(server name) RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'mmrepl_retry_now';
COMMENT ON FUNCTION mmrepl.retry_now(name) IS 'try again at once what waits for its next attempt or is blocked';

CREATE FUNCTION mmrepl.skip(server name, ticket bigint, reason text) RETURNS bigint
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_skip';
COMMENT ON FUNCTION mmrepl.skip(name, bigint, text) IS
	'drop one queued transaction, on the record (mmrepl.skipped); returns the number of its changes';


/* ---- What is in doubt ---- */

CREATE FUNCTION mmrepl.doubts(
	OUT stream integer,
	OUT kind text,
	OUT gid text,
	OUT xid bigint,
	OUT ticket bigint,
	OUT since timestamptz,
	OUT state text,
	OUT next_step text)
	RETURNS SETOF record
	LANGUAGE c ROWS 10 AS 'MODULE_PATHNAME', 'mmrepl_doubts';
COMMENT ON FUNCTION mmrepl.doubts() IS
	'synchronous transactions whose end at the peer is not known here, as far as the caller may see them';

CREATE VIEW mmrepl.in_doubt WITH (security_barrier) AS
SELECT coalesce(f.srvname, t.server_name) AS server,
	   d.kind,
	   d.gid,
	   d.xid,
	   d.ticket,
	   d.since,
	   pg_catalog.clock_timestamp() - d.since AS age,
	   d.state,
	   d.next_step,
	   t.owner::regrole AS owner,
	   t.stream_id AS stream
  FROM mmrepl.doubts() d
  JOIN mmrepl.stream t ON t.stream_id = d.stream
  LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.server;

COMMENT ON VIEW mmrepl.in_doubt IS
	'synchronous transactions whose end at the peer is not known here; they are completed by themselves';
COMMENT ON COLUMN mmrepl.in_doubt.server IS 'the foreign server';
COMMENT ON COLUMN mmrepl.in_doubt.kind IS
	'last agent: the peer commits right after this node; two-phase: it is prepared there before';
COMMENT ON COLUMN mmrepl.in_doubt.gid IS 'name of the prepared transaction at the peer; NULL: last agent';
COMMENT ON COLUMN mmrepl.in_doubt.xid IS 'transaction id here';
COMMENT ON COLUMN mmrepl.in_doubt.ticket IS 'its place in the commit order; NULL: it did not come so far';
COMMENT ON COLUMN mmrepl.in_doubt.since IS 'since when: its commit here, else (by the peer''s clock) when it was prepared';
COMMENT ON COLUMN mmrepl.in_doubt.age IS 'for how long';
COMMENT ON COLUMN mmrepl.in_doubt.state IS
	'what became of it here: committed, aborted, skipped, running, or unknown (this node was restored from an older state)';
COMMENT ON COLUMN mmrepl.in_doubt.next_step IS 'what happens next, and who does it';
COMMENT ON COLUMN mmrepl.in_doubt.owner IS 'the role whose user mapping is used';
COMMENT ON COLUMN mmrepl.in_doubt.stream IS 'id of the stream';

GRANT SELECT ON mmrepl.in_doubt TO PUBLIC;


/* ---- Statistics ---- */

/*
 * The functions show what is in shared memory, and the views join it with what the
 * tables say: both as far as the caller may see it.  The barrier keeps conditions of
 * the caller's making from looking at other rows.
 */

CREATE FUNCTION mmrepl.stat_streams(
	OUT stream integer,
	OUT state text,
	OUT pid integer,
	OUT queue_transactions bigint,
	OUT queue_changes bigint,
	OUT queue_bytes bigint,
	OUT oldest_queued_at timestamptz,
	OUT replay_lag interval,
	OUT last_ticket bigint,
	OUT confirmed_ticket bigint,
	OUT transactions_applied bigint,
	OUT changes_applied bigint,
	OUT bytes_sent bigint,
	OUT batches bigint,
	OUT retries bigint,
	OUT consecutive_failures integer,
	OUT next_retry_at timestamptz,
	OUT last_error text,
	OUT last_error_sqlstate text,
	OUT last_error_at timestamptz,
	OUT conflicts bigint,
	OUT sync_transactions bigint,
	OUT sync_failures bigint,
	OUT stats_reset timestamptz,
	OUT peer_node uuid,
	OUT last_apply_at timestamptz,
	OUT blocked_ticket bigint,
	OUT queue_warned_at timestamptz,
	OUT batches_ahead bigint,
	OUT batches_redone bigint)
	RETURNS SETOF record
	LANGUAGE c ROWS 10 AS 'MODULE_PATHNAME', 'mmrepl_stat_streams';
COMMENT ON FUNCTION mmrepl.stat_streams() IS
	'statistics of this database''s streams in shared memory, as far as the caller may see them';

CREATE FUNCTION mmrepl.may_see_statistics(owner oid) RETURNS boolean
	LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'mmrepl_may_see_statistics';
COMMENT ON FUNCTION mmrepl.may_see_statistics(oid) IS
	'whether the caller may see statistics of the owner''s pairs: the owner, who has its rights, pg_read_all_stats';

CREATE VIEW mmrepl.pg_stat_mmrepl WITH (security_barrier) AS
WITH known AS (
	SELECT t.stream_id, f.oid AS server, coalesce(f.srvname, t.server_name) AS server_name, t.owner,
		   t.paused, nullif(t.confirmed, 0) AS confirmed, t.resync_since, t.resync_reason,
		   EXISTS (SELECT FROM mmrepl.pair p WHERE p.server = f.srvname AND p.owner = t.owner) AS has_pairs
	  FROM mmrepl.stream t LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.server
	UNION ALL
	SELECT DISTINCT NULL::integer, f.oid, p.server, p.owner::oid, false, NULL::bigint, NULL::timestamptz, NULL::text, true
	  FROM mmrepl.pair p LEFT JOIN pg_catalog.pg_foreign_server f ON f.srvname = p.server
	 WHERE NOT EXISTS (SELECT FROM mmrepl.stream t WHERE t.server = f.oid AND t.owner = p.owner)
)
SELECT k.server_name AS server,
	   CASE WHEN k.resync_since IS NOT NULL THEN 'needs resync'
			ELSE coalesce(s.state, CASE WHEN k.paused THEN 'paused' ELSE 'starting' END) END AS state,
	   s.pid,
	   s.queue_transactions,
	   s.queue_changes,
	   s.queue_bytes,
	   s.oldest_queued_at,
	   s.replay_lag,
	   s.last_ticket,
	   coalesce(s.confirmed_ticket, k.confirmed) AS confirmed_ticket,
	   s.transactions_applied,
	   s.changes_applied,
	   s.bytes_sent,
	   s.batches,
	   s.retries,
	   s.consecutive_failures,
	   s.next_retry_at,
	   s.last_error,
	   s.last_error_sqlstate,
	   s.last_error_at,
	   s.conflicts,
	   s.sync_transactions,
	   s.sync_failures,
	   s.stats_reset,
	   k.owner::regrole AS owner,
	   k.stream_id AS stream,
	   s.peer_node,
	   s.last_apply_at,
	   s.blocked_ticket,
	   s.queue_warned_at,
	   k.resync_since,
	   k.resync_reason,
	   s.batches_ahead,
	   s.batches_redone
  FROM known k LEFT JOIN mmrepl.stat_streams() s ON s.stream = k.stream_id
 WHERE (k.has_pairs OR s.stream IS NOT NULL)
   AND mmrepl.may_see_statistics(k.owner);

COMMENT ON VIEW mmrepl.pg_stat_mmrepl IS
	'statistics, one row per server (and owner) with pairs; NULL where nothing is known';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.server IS 'the foreign server';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.state IS
	'starting, streaming, catching up, retrying, paused, blocked (by a transaction that the target refuses), or needs resync (too much was waiting)';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.pid IS 'process id of the worker; NULL: none runs';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.queue_transactions IS 'committed transactions that are not confirmed by the target';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.queue_changes IS 'changes in these transactions';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.queue_bytes IS 'encoded size of these changes';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.oldest_queued_at IS 'when the oldest of these transactions was committed; NULL: none waits';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.replay_lag IS
	'age of the oldest unconfirmed transaction; when none waits, how long the last one took from commit here to confirmation';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.last_ticket IS 'last ticket drawn for the server; tickets are commit times in microseconds since 1970, or more';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.confirmed_ticket IS 'everything up to this ticket is committed at the target';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.transactions_applied IS 'transactions delivered from the queue';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.changes_applied IS 'changes delivered from the queue';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.bytes_sent IS 'bytes of batches sent';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.batches IS 'batches that the target confirmed';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.retries IS 'attempts that failed and were, or will be, made again';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.consecutive_failures IS 'failed attempts since the last success';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.next_retry_at IS 'when the next attempt is made; NULL: none is waiting';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.last_error IS
	'message of the last failed attempt; detail and context, which may show rows, for those who may see queued data';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.last_error_sqlstate IS 'its SQLSTATE';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.last_error_at IS 'when it failed';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.conflicts IS 'conflicts met here while applying what came from that server''s node';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.sync_transactions IS 'transactions executed at the target inline (sync)';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.sync_failures IS 'inline transactions that failed or were left to the queue';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.stats_reset IS 'since when the counters count';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.owner IS 'the role whose user mapping is used';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.stream IS 'id of the stream (mmrepl.progress.stream at the target); NULL: nothing was ever captured for it';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.peer_node IS 'node id that the target gave at the last connect';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.last_apply_at IS 'when the target last confirmed a batch';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.blocked_ticket IS 'the transaction that the target refuses (see skip()); NULL: none';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.queue_warned_at IS 'when so much was waiting that the log warned (mmrepl.max_queue_size); NULL: less waits now';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.resync_since IS 'since when nothing is queued for the server, because too much was waiting; NULL: all is well';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.resync_reason IS 'what happened then, and what to do';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.batches_ahead IS 'of these batches, those that were executed before the one before had committed (lanes)';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl.batches_redone IS 'batches that were executed so in vain, and then once more';

CREATE FUNCTION mmrepl.stat_pairs(
	OUT pair_id integer,
	OUT inserts bigint,
	OUT updates bigint,
	OUT deletes bigint,
	OUT truncates bigint)
	RETURNS SETOF record
	LANGUAGE c ROWS 100 AS 'MODULE_PATHNAME', 'mmrepl_stat_pairs';
COMMENT ON FUNCTION mmrepl.stat_pairs() IS 
	'counters of this database''s pairs that have captured something, as far as the caller may see them';

CREATE FUNCTION mmrepl.stat_conflicts(
	OUT local_table regclass,
	OUT server oid,
	OUT conflicts bigint)
	RETURNS SETOF record
	LANGUAGE c ROWS 100 AS 'MODULE_PATHNAME', 'mmrepl_stat_conflicts';
COMMENT ON FUNCTION mmrepl.stat_conflicts() IS
	'conflicts met on tables of pairs, by the server whose node the changes came from, as far as the caller may see them';

CREATE VIEW mmrepl.pg_stat_mmrepl_pairs WITH (security_barrier) AS
SELECT p.pair_id,
	   p.server,
	   p.local_table,
	   coalesce(s.inserts, 0) AS inserts,
	   coalesce(s.updates, 0) AS updates,
	   coalesce(s.deletes, 0) AS deletes,
	   coalesce(s.truncates, 0) AS truncates,
	   coalesce(c.conflicts, 0) AS conflicts,
	   p.owner
  FROM mmrepl.pair p
  LEFT JOIN mmrepl.stat_pairs() s ON s.pair_id = p.pair_id
  LEFT JOIN pg_catalog.pg_foreign_server f ON f.srvname = p.server
  LEFT JOIN mmrepl.stat_conflicts() c ON c.local_table = p.local_table AND c.server = f.oid
 WHERE mmrepl.may_see_statistics(p.owner);

COMMENT ON VIEW mmrepl.pg_stat_mmrepl_pairs IS 'statistics, one row per pair; what was committed or prepared counts';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.inserts IS 'rows captured by INSERT';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.updates IS 'rows captured by UPDATE';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.deletes IS 'rows captured by DELETE';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.truncates IS 'TRUNCATEs captured';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.conflicts IS 'conflicts met here while applying the table''s changes of that server''s node';
COMMENT ON COLUMN mmrepl.pg_stat_mmrepl_pairs.owner IS 'the role whose user mapping is used';

GRANT SELECT ON mmrepl.pg_stat_mmrepl TO PUBLIC;
GRANT SELECT ON mmrepl.pg_stat_mmrepl_pairs TO PUBLIC;

CREATE FUNCTION mmrepl.reset_counters(server name, pair_ids integer[]) RETURNS void
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_reset_counters';
COMMENT ON FUNCTION mmrepl.reset_counters(name, integer[]) IS 'the part of stat_reset() that is in shared memory';

CREATE FUNCTION mmrepl.stat_reset(server name DEFAULT NULL) RETURNS void
	LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
	AS 'SELECT mmrepl.reset_counters($1, ARRAY(SELECT p.pair_id FROM mmrepl.pair p WHERE p.server = $1))';
COMMENT ON FUNCTION mmrepl.stat_reset(name) IS 'set the counters of a server, or (NULL) of all, to zero';

REVOKE ALL ON FUNCTION mmrepl.reset_counters(name, integer[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION mmrepl.stat_reset(name) FROM PUBLIC;


/* ---- Event triggers: what a pair is made of must not vanish from under it ---- */

CREATE FUNCTION mmrepl.on_ddl_end() RETURNS event_trigger
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_on_ddl_end';
COMMENT ON FUNCTION mmrepl.on_ddl_end() IS 'keep pairs in step with DDL on their tables and servers';

CREATE FUNCTION mmrepl.on_drop() RETURNS event_trigger
	LANGUAGE c AS 'MODULE_PATHNAME', 'mmrepl_on_drop';
COMMENT ON FUNCTION mmrepl.on_drop() IS 'clean up after, or refuse, the drop of what pairs need';

CREATE EVENT TRIGGER mmrepl_ddl_end ON ddl_command_end EXECUTE FUNCTION mmrepl.on_ddl_end();
ALTER EVENT TRIGGER mmrepl_ddl_end ENABLE ALWAYS;
COMMENT ON EVENT TRIGGER mmrepl_ddl_end IS 'keep pairs in step with DDL on their tables and servers';

CREATE EVENT TRIGGER mmrepl_sql_drop ON sql_drop EXECUTE FUNCTION mmrepl.on_drop();
ALTER EVENT TRIGGER mmrepl_sql_drop ENABLE ALWAYS;
COMMENT ON EVENT TRIGGER mmrepl_sql_drop IS 'clean up after, or refuse, the drop of what pairs need';
