-- Takes the guard out of this database. The role goes with it unless another database still has a guard.
DO $walguard$
DECLARE
  one record;
BEGIN
  PERFORM set_config('lock_timeout', '5s', true);
  PERFORM set_config('walguard.reason', 'walguard guard uninstall', true);
  FOR one IN
    SELECT e.evtname FROM pg_catalog.pg_event_trigger AS e JOIN pg_catalog.pg_proc AS f ON f.oid = e.evtfoid
      JOIN pg_catalog.pg_namespace AS n ON n.oid = f.pronamespace WHERE n.nspname = 'walguard_guard'
  LOOP
    EXECUTE pg_catalog.format('DROP EVENT TRIGGER %I', one.evtname);
  END LOOP;
  FOR one IN
    SELECT n.nspname, c.relname, t.tgname
    FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_proc AS f ON f.oid = t.tgfoid
      JOIN pg_catalog.pg_namespace AS own ON own.oid = f.pronamespace
      JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE own.nspname = 'walguard_guard' AND NOT t.tgisinternal
  LOOP
    EXECUTE pg_catalog.format('DROP TRIGGER %I ON %I.%I', one.tgname, one.nspname, one.relname);
  END LOOP;
  IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'walguard_guard') THEN
    -- What the role owns is the schema with its functions; what it was granted goes too.
    DROP OWNED BY walguard_guard CASCADE;
    BEGIN
      DROP ROLE walguard_guard;
    EXCEPTION WHEN dependent_objects_still_exist THEN
      RAISE NOTICE 'the role walguard_guard stays: another database has a guard';
    END;
  END IF;
END
$walguard$;
