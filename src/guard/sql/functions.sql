-- What the guard runs. The functions belong to a role that nobody logs in as; whoever owns a table can take its trigger
-- away (which is told), and cannot change what it does.
DO $walguard$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'walguard_guard') THEN
    CREATE ROLE walguard_guard NOLOGIN;
  END IF;
  -- Whoever makes something for a role must be able to act as that role; a superuser always is.
  IF NOT pg_catalog.pg_has_role(current_user, 'walguard_guard', 'USAGE') THEN
    EXECUTE pg_catalog.format('GRANT walguard_guard TO %I', current_user);
  END IF;
END
$walguard$;
CREATE SCHEMA IF NOT EXISTS walguard_guard AUTHORIZATION walguard_guard;
REVOKE ALL ON SCHEMA walguard_guard FROM PUBLIC;
COMMENT ON SCHEMA walguard_guard IS 'walguard: writes into the WAL who deletes, empties and drops. See walguard guard status';
DO $walguard$
DECLARE
  one regprocedure;
BEGIN
  FOR one IN SELECT oid FROM pg_catalog.pg_proc
    WHERE proname = 'pg_logical_emit_message' AND NOT pg_catalog.has_function_privilege('walguard_guard', oid, 'EXECUTE')
  LOOP
    EXECUTE pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO walguard_guard', one);
  END LOOP;
  -- For the time at which a session began; it is shown to nobody else.
  IF NOT pg_catalog.pg_has_role('walguard_guard', 'pg_read_all_stats', 'USAGE') THEN
    GRANT pg_read_all_stats TO walguard_guard;
  END IF;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'walguard: the guard will not tell all: %', SQLERRM;
END
$walguard$;

-- Who is at work, and what is to be told of it, as bytes. Never fails: NULL if it cannot be told.
CREATE OR REPLACE FUNCTION walguard_guard.message(what json) RETURNS bytea
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  began bigint;
  told text;
BEGIN
  -- Inside this block nothing is written, so that its subtransaction takes no transaction id.
  BEGIN
    -- The second is that of 17 and later.
    IF NOT has_function_privilege('walguard_guard', coalesce(
        to_regprocedure('pg_logical_emit_message(boolean, text, bytea)'),
        to_regprocedure('pg_logical_emit_message(boolean, text, bytea, boolean)')), 'EXECUTE') THEN
      RETURN NULL;
    END IF;
    SELECT (extract(epoch FROM backend_start) * 1000000)::bigint - 946684800000000 INTO began
      FROM pg_stat_get_activity(pg_backend_pid());
    told := json_strip_nulls(json_build_object(
      'v', 1,
      'role', coalesce(nullif(current_setting('role'), 'none'), session_user::text),
      'session_user', session_user,
      'database', current_database(),
      'application', left(nullif(current_setting('application_name'), ''), 256),
      'client', host(inet_client_addr()),
      'port', inet_client_port(),
      'pid', pg_backend_pid(),
      'backend_start', began,
      'transaction_start', (extract(epoch FROM transaction_timestamp()) * 1000000)::bigint - 946684800000000,
      'query', left(current_query(), 2000),
      'reason', left(nullif(current_setting('walguard.reason', true), ''), 500),
      'what', what))::text;
    BEGIN
      RETURN convert_to(told, 'UTF8');
    EXCEPTION WHEN OTHERS THEN
      RETURN convert_to(regexp_replace(told, '[^ -~]', '?', 'g'), 'SQL_ASCII');
    END;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
    RETURN NULL;
  END;
END
$walguard$;

-- After a statement that deletes or updates rows. With a transition table `gone` it knows how many; without, it tells that
-- it happened.
CREATE OR REPLACE FUNCTION walguard_guard.rows_counted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  number bigint;
  bytes bytea;
  told text;
BEGIN
  SELECT count(*) INTO number FROM gone;
  IF number = 0 THEN
    RETURN NULL;
  END IF;
  -- A trigger that deletes elsewhere may run for each row: then the first one of a transaction and table is told, and large
  -- ones. (What a foreign key cascades to is one statement for all rows.)
  IF pg_trigger_depth() > 1 AND number < 10 THEN
    told := pg_current_xact_id()::text || ':' || TG_RELID || ':' || TG_OP;
    IF told = ANY (string_to_array(current_setting('walguard.told', true), ' ')) THEN
      RETURN NULL;
    END IF;
    PERFORM set_config('walguard.told', right(concat_ws(' ', current_setting('walguard.told', true), told), 4000), true);
  END IF;
  bytes := walguard_guard.message(json_build_object('op', lower(TG_OP), 'schema', TG_TABLE_SCHEMA, 'table', TG_TABLE_NAME,
    'oid', TG_RELID::bigint, 'rows', number));
  IF bytes IS NOT NULL THEN
    PERFORM pg_logical_emit_message(true, 'walguard', bytes);
  END IF;
  RETURN NULL;
END
$walguard$;

CREATE OR REPLACE FUNCTION walguard_guard.rows_told() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  bytes bytea;
  told text;
BEGIN
  IF pg_trigger_depth() > 1 THEN
    told := pg_current_xact_id()::text || ':' || TG_RELID || ':' || TG_OP;
    IF told = ANY (string_to_array(current_setting('walguard.told', true), ' ')) THEN
      RETURN NULL;
    END IF;
    PERFORM set_config('walguard.told', right(concat_ws(' ', current_setting('walguard.told', true), told), 4000), true);
  END IF;
  bytes := walguard_guard.message(json_build_object('op', lower(TG_OP), 'schema', TG_TABLE_SCHEMA, 'table', TG_TABLE_NAME,
    'oid', TG_RELID::bigint));
  IF bytes IS NOT NULL THEN
    PERFORM pg_logical_emit_message(true, 'walguard', bytes);
  END IF;
  RETURN NULL;
END
$walguard$;

-- Refuses to empty a table unless the session gave a reason.
CREATE OR REPLACE FUNCTION walguard_guard.refuse_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
BEGIN
  IF coalesce(current_setting('walguard.reason', true), '') = '' THEN
    RAISE EXCEPTION 'TRUNCATE of %.% is refused', TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege',
            HINT = 'If it is meant, say why first: SET walguard.reason = ''...''; the reason is written into the WAL.';
  END IF;
  RETURN NULL;
END
$walguard$;

CREATE OR REPLACE FUNCTION walguard_guard.refuse_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  number bigint;
  estimate float8;
  is_left boolean := false;
BEGIN
  IF coalesce(current_setting('walguard.reason', true), '') <> '' THEN
    RETURN NULL;
  END IF;
  SELECT count(*) INTO number FROM gone;
  -- One row of a queue, the last there is, is nobody's loss.
  IF number < 5 THEN
    RETURN NULL;
  END IF;
  SELECT reltuples INTO estimate FROM pg_class WHERE oid = TG_RELID;
  IF estimate > 0 AND number < estimate / 2 THEN
    RETURN NULL;
  END IF;
  BEGIN
    IF row_security_active(TG_RELID) THEN
      is_left := estimate > number;
    ELSE
      EXECUTE format('SELECT EXISTS (SELECT FROM %I.%I)', TG_TABLE_SCHEMA, TG_TABLE_NAME) INTO is_left;
    END IF;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
    is_left := true;
  END;
  IF NOT is_left THEN
    RAISE EXCEPTION 'DELETE of all % rows of %.% is refused', number, TG_TABLE_SCHEMA, TG_TABLE_NAME
      USING ERRCODE = 'insufficient_privilege',
            HINT = 'If it is meant, say why first: SET walguard.reason = ''...''; the reason is written into the WAL.';
  END IF;
  RETURN NULL;
END
$walguard$;

-- After definitions changed.
CREATE OR REPLACE FUNCTION walguard_guard.definitions_changed() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  objects json;
  number bigint;
  bytes bytea;
BEGIN
  BEGIN
    SELECT count(*), json_agg(json_build_array(object_type, left(object_identity, 200))) FILTER (WHERE place <= 50)
      INTO number, objects
      FROM (SELECT object_type, object_identity, row_number() OVER () AS place
            FROM pg_event_trigger_ddl_commands()
            WHERE schema_name IS NULL OR schema_name <> 'pg_temp') AS commands;
    IF number > 0 THEN
      bytes := walguard_guard.message(json_build_object('op', 'ddl', 'tag', TG_TAG, 'objects', objects, 'objects_total', number));
    END IF;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
  END;
  IF bytes IS NOT NULL THEN
    PERFORM pg_logical_emit_message(true, 'walguard', bytes);
  END IF;
END
$walguard$;

-- After objects were dropped.
CREATE OR REPLACE FUNCTION walguard_guard.objects_dropped() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  objects json;
  number bigint;
  bytes bytea;
BEGIN
  BEGIN
    -- What goes along with a table (its type, its indexes, its defaults) is not told one by one.
    SELECT count(*), json_agg(json_build_array(object_type, left(object_identity, 200))) FILTER (WHERE place <= 50)
      INTO number, objects
      FROM (SELECT object_type, object_identity, row_number() OVER (ORDER BY original DESC, object_type <> 'table') AS place
            FROM pg_event_trigger_dropped_objects()
            WHERE NOT is_temporary AND (original OR object_type IN ('table', 'schema', 'trigger', 'policy', 'rule'))) AS gone;
    IF number > 0 THEN
      bytes := walguard_guard.message(json_build_object('op', 'drop', 'tag', TG_TAG, 'objects', objects, 'objects_total', number));
    END IF;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
  END;
  IF bytes IS NOT NULL THEN
    PERFORM pg_logical_emit_message(true, 'walguard', bytes);
  END IF;
END
$walguard$;

-- Refuses to drop a guarded table, and to take the guard away, unless the session gave a reason.
CREATE OR REPLACE FUNCTION walguard_guard.refuse_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  victim text;
BEGIN
  IF coalesce(current_setting('walguard.reason', true), '') <> '' THEN
    RETURN;
  END IF;
  BEGIN
    SELECT object_identity INTO victim FROM pg_event_trigger_dropped_objects()
      WHERE NOT is_temporary
        AND (object_type = 'table' AND schema_name || '.' || object_name ~ @INCLUDE@
                                   AND NOT schema_name || '.' || object_name ~ @EXCLUDE@
             OR object_type = 'trigger' AND original AND object_identity LIKE 'walguard\_%'
             OR schema_name = 'walguard_guard' OR object_type = 'schema' AND object_name = 'walguard_guard')
      LIMIT 1;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
  END;
  IF victim IS NOT NULL THEN
    RAISE EXCEPTION '% of % is refused', TG_TAG, victim
      USING ERRCODE = 'insufficient_privilege',
            HINT = 'If it is meant, say why first: SET walguard.reason = ''...''; the reason is written into the WAL.';
  END IF;
END
$walguard$;

-- Refuses to disable the guard's triggers unless the session gave a reason.
CREATE OR REPLACE FUNCTION walguard_guard.refuse_disable() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $walguard$
DECLARE
  victim text;
BEGIN
  IF coalesce(current_setting('walguard.reason', true), '') <> '' THEN
    RETURN;
  END IF;
  BEGIN
    SELECT format('trigger %I on %s', t.tgname, c.object_identity) INTO victim
      FROM pg_event_trigger_ddl_commands() AS c JOIN pg_trigger AS t ON t.tgrelid = c.objid
        JOIN pg_proc AS f ON f.oid = t.tgfoid
      WHERE c.classid = 'pg_class'::regclass AND t.tgenabled <> 'A' AND f.pronamespace = 'walguard_guard'::regnamespace
      LIMIT 1;
  EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'walguard_guard: %', SQLERRM;
  END;
  IF victim IS NOT NULL THEN
    RAISE EXCEPTION 'to disable % is refused', victim
      USING ERRCODE = 'insufficient_privilege',
            HINT = 'If it is meant, say why first: SET walguard.reason = ''...''; the reason is written into the WAL.';
  END IF;
END
$walguard$;

DO $walguard$
DECLARE
  one regprocedure;
BEGIN
  FOR one IN SELECT oid FROM pg_catalog.pg_proc WHERE pronamespace = 'walguard_guard'::regnamespace LOOP
    EXECUTE pg_catalog.format('ALTER FUNCTION %s OWNER TO walguard_guard', one);
    EXECUTE pg_catalog.format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one);
  END LOOP;
END
$walguard$;
