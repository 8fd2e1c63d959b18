-- On which tables it watches. Nothing is locked that has its triggers already; whoever is in the way for five seconds ends
-- this, and nothing is done.
DO $walguard$
DECLARE
  one record;
BEGIN
  PERFORM set_config('lock_timeout', '5s', true);
  PERFORM set_config('walguard.reason', 'walguard guard', true);
  FOR one IN
    SELECT c.oid, n.nspname, c.relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE @CHOSEN@ ORDER BY n.nspname, c.relname
  LOOP
    IF @PROTECT@ AND NOT pg_catalog.has_table_privilege('walguard_guard', one.oid, 'SELECT') THEN
      EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA %I TO walguard_guard', one.nspname);
      EXECUTE pg_catalog.format('GRANT SELECT ON %I.%I TO walguard_guard', one.nspname, one.relname);
    END IF;
  END LOOP;
  FOR one IN
    SELECT c.nspname, c.relname, w.* FROM (
      SELECT c.oid, n.nspname, c.relname
      FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE @CHOSEN@
    ) AS c CROSS JOIN (VALUES @WANTED@) AS w (name, event, rows, function, type)
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = c.oid AND t.tgname = w.name
      AND t.tgfoid = pg_catalog.to_regproc('walguard_guard.' || w.function) AND t.tgenabled = 'A' AND t.tgtype = w.type
      AND (t.tgoldtable IS NOT NULL) = (w.rows <> ''))
    ORDER BY c.nspname, c.relname, w.name
  LOOP
    EXECUTE pg_catalog.format('CREATE OR REPLACE TRIGGER %I %s ON %I.%I %s FOR EACH STATEMENT EXECUTE FUNCTION walguard_guard.%I()',
      one.name, one.event, one.nspname, one.relname, one.rows, one.function);
    EXECUTE pg_catalog.format('ALTER TABLE ONLY %I.%I ENABLE ALWAYS TRIGGER %I', one.nspname, one.relname, one.name);
  END LOOP;
  -- Those that are no longer asked for.
  FOR one IN
    SELECT n.nspname, c.relname, t.tgname
    FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_proc AS f ON f.oid = t.tgfoid
      JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE f.pronamespace = 'walguard_guard'::regnamespace AND NOT t.tgisinternal
      AND NOT (@CHOSEN@ AND t.tgname IN (SELECT w.name FROM (VALUES @WANTED@) AS w (name, event, rows, function, type)))
  LOOP
    EXECUTE pg_catalog.format('DROP TRIGGER %I ON %I.%I', one.tgname, one.nspname, one.relname);
  END LOOP;
END
$walguard$;
