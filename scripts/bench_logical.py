"""Measures the keeping and the rebuilding of a managed database; see scripts/bench-logical, which sets everything up."""

import json
import os
import shutil
import statistics
import subprocess
import time

import psycopg2

from stage import ACCOUNT, PGBIN, WALGUARD, as_postgres, dsn, free_port, pgbench, process, run, scratch, server, wait

ROUNDS = int(os.environ.get("ROUNDS", "3"))
SCALE = int(os.environ.get("SCALE", "30"))
TX = int(os.environ.get("TX", "200000"))
OPTIONS = ("wal_level=logical", "max_wal_size=8GB", "checkpoint_timeout=30min", "shared_buffers=1GB", "synchronous_commit=off", "wal_retrieve_retry_interval=100ms")


def connect(port, database="postgres"):
    connection = psycopg2.connect(dsn(port, database))
    connection.autocommit = True
    return connection.cursor()


def one(sql, query, *values):
    sql.execute(query, values)
    return sql.fetchone()[0]


def took(command, **options):
    begin = time.time()
    run(command, **options)
    return time.time() - begin


def guard(config, *verb):
    """Runs a verb of walguard; gives what it says as JSON."""
    done = as_postgres([WALGUARD, *verb, "--config", config, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = done.communicate()
    if done.returncode != 0:
        raise SystemExit(f"error: walguard {' '.join(verb)}: {error.decode()}")
    return json.loads(out)


def size_of(folder):
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)


def fill(source):
    """A database like pgbench's, with rows that compress like real ones and a key in every table."""
    run(pgbench(source, "-i", "-q", "-s", str(SCALE), database="app"))
    sql = connect(source, "app")
    sql.execute("UPDATE pgbench_accounts SET filler = md5(aid::text) || md5((aid * 7)::text)")
    sql.execute("ALTER TABLE pgbench_history ADD COLUMN id bigserial PRIMARY KEY")
    sql.execute("VACUUM FULL ANALYZE pgbench_accounts")
    return sql


def base(label, space, config, target):
    """Both ways out of the database and into another one; seconds by name."""
    dump = os.path.join(space, "dump")
    shutil.rmtree(dump, ignore_errors=True)
    ours = ["-h", "127.0.0.1", "-U", "postgres"]
    source = str(target["source"])
    seconds = {}
    seconds["pg_dump -Fd -j2"] = took([f"{PGBIN}/pg_dump", *ours, "-p", source, "-Fd", "-j2", "-Z1", "-f", dump, "app"])
    begin = time.time()
    taken = guard(config, "backup", "--label", label)
    seconds["walguard backup"] = time.time() - begin
    sql = connect(target["port"])
    for database in ("dumped", "rebuilt"):
        sql.execute(f"DROP DATABASE IF EXISTS {database}")
        sql.execute(f"CREATE DATABASE {database} TEMPLATE template0")
    sql.execute("CHECKPOINT")
    restore = [f"{PGBIN}/pg_restore", *ours, "-p", str(target["port"]), "-j2", "-d", "dumped", dump]
    seconds["pg_restore -j2"] = took(restore)
    sql.execute("CHECKPOINT")
    begin = time.time()
    guard(config, "restore", "--yes", "--to", "latest", "--backup", label, "--into", dsn(target["port"], "rebuilt"))
    seconds["walguard restore"] = time.time() - begin
    return seconds, taken


def wait_confirmed(sql, slot, lsn):
    query = "SELECT coalesce(confirmed_flush_lsn >= %s::pg_lsn, false) FROM pg_replication_slots WHERE slot_name = %s"
    wait(f"slot {slot} to reach {lsn}", lambda: one(sql, query, lsn, slot), 900)


def changes(name, space, config, source, target):
    """The same backlog kept by walguard, repeated by it, and applied by a subscription."""
    sql, there = connect(source, "app"), connect(target)
    there.execute(f"DROP DATABASE IF EXISTS {name}")
    there.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    schema = as_postgres([f"{PGBIN}/pg_dump", "-s", "--no-publications", "-h", "127.0.0.1", "-p", str(source), "-U", "postgres", "app"],
                         stdout=subprocess.PIPE)
    run([f"{PGBIN}/psql", "-q", "-h", "127.0.0.1", "-p", str(target), "-U", "postgres", name], stdin=schema.stdout)
    applying = connect(target, name)
    applying.execute(
        f"CREATE SUBSCRIPTION {name} CONNECTION '{dsn(source, 'app')}' PUBLICATION walguard WITH (streaming = on)"
    )
    wait("the tables to be copied", lambda: one(applying, "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel"), 900)
    applying.execute(f"ALTER SUBSCRIPTION {name} DISABLE")
    taken = guard(config, "backup", "--label", name)
    begin_lsn = one(sql, "SELECT pg_current_wal_insert_lsn()")
    run(pgbench(source, "-n", "-c", "4", "-j", "2", "-M", "prepared", "-t", str(TX // 4), database="app"))
    end = one(sql, "SELECT pg_current_wal_insert_lsn()")
    sql.execute("SELECT pg_logical_emit_message(true, 'end', '')")
    wal = one(sql, "SELECT %s::pg_lsn - %s::pg_lsn", end, begin_lsn)
    seconds = {}
    begin = time.time()
    log = open(os.path.join(space, "agent.log"), "a")
    with process([WALGUARD, "run", "--no-backups", "--config", config], stdout=log, stderr=log):
        wait_confirmed(sql, "walguard", end)
        seconds["walguard keeps them"] = time.time() - begin
    begin = time.time()
    applying.execute(f"ALTER SUBSCRIPTION {name} ENABLE")
    wait_confirmed(sql, name, end)
    seconds["subscription applies them"] = time.time() - begin
    applied = one(applying, "SELECT sum(abalance) FROM pgbench_accounts")
    applying.execute(f"DROP SUBSCRIPTION {name}")
    there.execute("DROP DATABASE IF EXISTS rebuilt")
    there.execute("CREATE DATABASE rebuilt TEMPLATE template0")
    told = guard(config, "restore", "--yes", "--to", "latest", "--backup", taken["label"], "--into", dsn(target, "rebuilt"))
    seconds["walguard repeats them"] = told["restore"]["seconds"]["changes"]
    rebuilt = one(connect(target, "rebuilt"), "SELECT sum(abalance) FROM pgbench_accounts")
    if not applied == rebuilt == one(sql, "SELECT sum(abalance) FROM pgbench_accounts"):
        raise SystemExit(f"error: the sums differ: {applied}, {rebuilt}")
    return seconds, told["restore"]["changes"], float(wal)


def table(title, rounds, amount, unit):
    print(f"\n| {title} | seconds (median of {len(rounds)}) | {unit}/s |\n|---|---|---|", flush=True)
    for name in rounds[0]:
        median = statistics.median(round[name] for round in rounds)
        print(f"| {name} | {median:.2f} ({min(r[name] for r in rounds):.2f} to {max(r[name] for r in rounds):.2f}) | {amount / median:,.0f} |")


def main():
    with scratch("logical") as space, server(space, "source", *OPTIONS) as source, server(space, "target", *OPTIONS) as target:
        connect(source).execute("CREATE DATABASE app")
        sql = fill(source)
        config, http = os.path.join(space, "walguard.toml"), free_port()
        with open(config, "w") as out:
            out.write(
                f'cluster = "main"\nsource = "logical"\n[postgres]\nconninfo = "{dsn(source, "app")}"\n'
                f'[repository]\nurl = "file://{space}/repo"\n[spool]\ndir = "{space}/spool"\n[http]\nlisten = "127.0.0.1:{http}"\n'
            )
        guard(config, "init")
        log = open(os.path.join(space, "agent.log"), "a")
        # The change log must have begun before there can be a base.
        with process([WALGUARD, "run", "--no-backups", "--config", config], stdout=log, stderr=log):
            sql.execute("SELECT pg_logical_emit_message(true, 'begin', '')")
            wait_confirmed(sql, "walguard", one(sql, "SELECT pg_current_wal_insert_lsn()"))
        rows = one(sql, "SELECT sum(reltuples)::int8 FROM pg_class WHERE relname LIKE 'pgbench%%' AND relkind = 'r'")
        size = one(sql, "SELECT pg_database_size('app')")
        print(f"{rows:,} rows, {size / 2**20:.0f} MiB; {TX:,} transactions", flush=True)
        bases, repeats, count, wal = [], [], 0, 0
        for number in range(ROUNDS):
            seconds, taken = base(f"base-{number}", space, config, {"source": source, "port": target})
            print(seconds, flush=True)
            bases.append(seconds)
        print(f"base: {taken['content_bytes'] / 2**20:.0f} MiB of text, {taken['stored_bytes'] / 2**20:.0f} MiB stored;"
              f" dump: {size_of(os.path.join(space, 'dump')) / 2**20:.0f} MiB")
        table("base", bases, rows, "rows")
        for number in range(ROUNDS):
            seconds, count, wal = changes(f"round_{number}", space, config, source, target)
            print(seconds, count, flush=True)
            repeats.append(seconds)
        print(f"\n{count:,} changes of rows, {wal / 2**20:.0f} MiB of WAL")
        table("changes", repeats, count, "changes")


main()
