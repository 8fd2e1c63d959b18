-- Definitions: only a superuser may watch them.
DO $walguard$
DECLARE
  one record;
BEGIN
  PERFORM set_config('walguard.reason', 'walguard guard', true);
  FOR one IN
    SELECT e.evtname FROM pg_catalog.pg_event_trigger AS e JOIN pg_catalog.pg_proc AS f ON f.oid = e.evtfoid
    WHERE f.pronamespace = 'walguard_guard'::regnamespace
      AND e.evtname NOT IN (SELECT w.name FROM (VALUES @EVENTS@) AS w (name, event, function))
  LOOP
    EXECUTE pg_catalog.format('DROP EVENT TRIGGER %I', one.evtname);
  END LOOP;
  FOR one IN
    SELECT w.*, e.evtname FROM (VALUES @EVENTS@) AS w (name, event, function)
      LEFT JOIN pg_catalog.pg_event_trigger AS e ON e.evtname = w.name
    WHERE w.name IS NOT NULL AND (e.evtname IS NULL OR e.evtenabled <> 'A' OR e.evtevent <> w.event
      OR e.evtfoid <> pg_catalog.to_regproc('walguard_guard.' || w.function))
  LOOP
    IF one.evtname IS NOT NULL THEN
      EXECUTE pg_catalog.format('DROP EVENT TRIGGER %I', one.name);
    END IF;
    EXECUTE pg_catalog.format('CREATE EVENT TRIGGER %I ON %s EXECUTE FUNCTION walguard_guard.%I()',
      one.name, one.event, one.function);
    EXECUTE pg_catalog.format('ALTER EVENT TRIGGER %I ENABLE ALWAYS', one.name);
  END LOOP;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'walguard: definitions are not watched: %', SQLERRM
    USING HINT = 'Run this as a superuser, or set guard.definitions = false.';
END
$walguard$;
