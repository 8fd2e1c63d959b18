"""Lives an ordinary life under an agent; see scripts/soak, which sets everything up."""

import json
import os
import random
import subprocess
import sys
import threading
import time

import psycopg2
import psycopg2.errors

from stage import (PGBIN, WALGUARD, as_postgres, dsn, free_port, pgbench, process, run, scratch, server, status, wait,
                   wait_caught_up)

MINUTES = float(os.environ.get("MINUTES", "30"))
# pgbench's transactions a second: an ordinary load, and not the most that the machine can do.
RATE = os.environ.get("RATE", "200")

SCHEMA = """
CREATE TABLE queue (id bigserial PRIMARY KEY, job text);
CREATE TABLE orders (id int PRIMARY KEY, state text, at timestamptz DEFAULT now());
INSERT INTO orders SELECT i, 'new' FROM generate_series(1, 20000) i;
CREATE MATERIALIZED VIEW totals AS SELECT state, count(*) FROM orders GROUP BY state;
CREATE UNIQUE INDEX ON totals (state);
CREATE TABLE days (at int NOT NULL, n int) PARTITION BY RANGE (at);
CREATE TABLE jobs (id bigint PRIMARY KEY, job text);
CREATE TABLE stock (id int PRIMARY KEY, n int);
"""

# Of the published tables of the other server.
ELSEWHERE = """
CREATE TABLE jobs (id bigserial PRIMARY KEY, job text);
CREATE TABLE stock (id int PRIMARY KEY, n int);
INSERT INTO stock SELECT i, 0 FROM generate_series(1, 5000) i;
CREATE PUBLICATION all_of_it FOR ALL TABLES;
"""


class Life:
    """What goes on at once, each in a thread of its own, until the time is over."""

    def __init__(self):
        self.over = threading.Event()
        self.threads, self.did, self.problems = [], {}, []

    def goes_on(self, name, every, database, step):
        """Calls step(sql, number) each `every` seconds, beginning after the first."""

        def live():
            connection = psycopg2.connect(database)
            connection.autocommit = True
            sql, number = connection.cursor(), 0
            while not self.over.wait(every):
                try:
                    step(sql, number)
                    number += 1
                    self.did[name] = number
                except psycopg2.errors.DeadlockDetected:
                    pass  # as in life: it is tried again
                except Exception as error:  # told at the end, and the end is bad
                    self.problems.append(f"{name}: {error}")
                    return

        self.threads.append(threading.Thread(target=live))
        self.threads[-1].start()

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


def queue(sql, _):
    sql.execute("INSERT INTO queue (job) SELECT 'job' FROM generate_series(1, 50)")
    sql.execute("DELETE FROM queue WHERE id IN (SELECT id FROM queue ORDER BY id LIMIT 50)")


def partitions(sql, number):
    """A night: tomorrow's partition comes, the oldest goes."""
    sql.execute(f"CREATE TABLE days_{number:04} PARTITION OF days FOR VALUES FROM ({number}) TO ({number + 1})")
    sql.execute("INSERT INTO days SELECT %s, i FROM generate_series(1, 2000) i", (number,))
    if number >= 3:
        sql.execute(f"DROP TABLE days_{number - 3:04}")


def maintenance(sql, number):
    what = ["VACUUM FULL orders", "CLUSTER orders USING orders_pkey", "REINDEX TABLE CONCURRENTLY orders",
            "REFRESH MATERIALIZED VIEW CONCURRENTLY totals", "REFRESH MATERIALIZED VIEW totals", "ANALYZE", "VACUUM"]
    sql.execute(what[number % len(what)])


def orders(sql, number):
    """An application at work: most rows change in the course of time, few at once."""
    first = random.randrange(20000)
    sql.execute("UPDATE orders SET state = %s WHERE id BETWEEN %s AND %s", (f"s{number % 5}", first, first + 20))
    sql.execute("DELETE FROM orders WHERE id = %s", (first,))
    sql.execute("INSERT INTO orders VALUES (%s, 'new') ON CONFLICT DO NOTHING", (first,))


def migration(sql, number):
    """A release: tables are rewritten, nothing is lost."""
    sql.execute(f"ALTER TABLE orders ADD COLUMN c{number} uuid DEFAULT gen_random_uuid()")
    sql.execute(f"ALTER TABLE orders ALTER COLUMN id TYPE {'bigint' if number % 2 == 0 else 'int'}")
    sql.execute(f"CREATE INDEX CONCURRENTLY i{number} ON orders (c{number})")
    sql.execute(f"BEGIN; CREATE TABLE scratch AS SELECT * FROM orders; DELETE FROM scratch; DROP TABLE scratch; COMMIT")


def elsewhere(sql, _):
    """What the other server does, the apply worker does here."""
    sql.execute("INSERT INTO jobs (job) SELECT 'job' FROM generate_series(1, 40)")
    sql.execute("DELETE FROM jobs WHERE id IN (SELECT id FROM jobs ORDER BY id LIMIT 40)")
    sql.execute("UPDATE stock SET n = n + 1 WHERE id %% 50 = %s", (random.randrange(50),))


def main():
    with (
        scratch("soak") as space,
        server(space, "data") as here,
        server(space, "elsewhere", "wal_level=logical") as there,
    ):
        run(pgbench(here, "-i", "-q", "-s", "10"))
        connections = [psycopg2.connect(dsn(port)) for port in (here, there)]
        for connection in connections:
            connection.autocommit = True
        sql, other = (connection.cursor() for connection in connections)
        sql.execute(SCHEMA)
        other.execute(ELSEWHERE)
        sql.execute(f"CREATE SUBSCRIPTION of_it CONNECTION '{dsn(there)}' PUBLICATION all_of_it")
        # Both queues have had a life: a table that is new and emptied is nobody's queue yet, and is told of.
        for number in range(50):
            queue(sql, number)
            elsewhere(other, number)
        sql.execute("ANALYZE")
        sql.execute("CHECKPOINT")
        port, config = free_port(), os.path.join(space, "walguard.toml")
        with open(config, "w") as out:
            out.write(
                f'cluster = "main"\n[postgres]\nconninfo = "{dsn(here)}"\n[spool]\ndir = "{space}/spool"\n'
                f'[http]\nlisten = "127.0.0.1:{port}"\n[repository]\nurl = "file://{space}/repo"\n'
                '[[detect.adjust]]\nrules = ["drop-table"]\ntables = ["public.days_*"]\nseverity = "off"\n'
            )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        log = open(os.path.join(space, "agent.log"), "w")
        with process([WALGUARD, "run", "--config", config], stdout=log, stderr=log) as agent:
            wait_caught_up(sql, port)
            wait("rows to be counted", lambda: (status(port).get("detect") or {}).get("tables", 0) >= 8)
            life = Life()
            load = pgbench(here, "-n", "-c", "2", "-R", RATE, "-T", str(int(60 * MINUTES)))
            with process(load, **quiet):
                life.goes_on("queue", 0.1, dsn(here), queue)
                life.goes_on("partitions", 5, dsn(here), partitions)
                life.goes_on("maintenance", 7, dsn(here), maintenance)
                life.goes_on("orders", 0.2, dsn(here), orders)
                life.goes_on("migrations", 45, dsn(here), migration)
                life.goes_on("logical replication", 0.1, dsn(there), elsewhere)

                def restored_dump(sql, number):
                    sql.execute(f"CREATE DATABASE restored_{number}")
                    dump = as_postgres([f"{PGBIN}/pg_dump", "-d", dsn(here), "--no-subscriptions"],
                                       stdout=subprocess.PIPE)
                    into = as_postgres([f"{PGBIN}/psql", "-qX", "-v", "ON_ERROR_STOP=1", "-d",
                                        dsn(here, f"restored_{number}")], stdin=dump.stdout, **quiet)
                    dump.stdout.close()
                    if into.wait() or dump.wait():
                        raise RuntimeError("pg_dump | psql failed")

                life.goes_on("restored dumps", max(20, 10 * MINUTES), dsn(here), restored_dump)
                time.sleep(60 * MINUTES)
                life.end()
            wait_caught_up(sql, port)
            if agent.poll() is not None:
                sys.exit(f"error: the agent ended, see {log.name}")
            wal = status(port)["scan"]["position"]["lsn"]
        shown = as_postgres([WALGUARD, "incidents", "--all", "--limit", "10000", "--json", "--config", config],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        answer, problem = shown.communicate()
        if shown.returncode:
            sys.exit(problem.decode())
        incidents = json.loads(answer)
        for name, times in sorted(life.did.items()):
            print(f"{name}: {times} times")
        print(f"WAL up to {wal}, {len(incidents)} incidents in {MINUTES:g} minutes")
        for incident in incidents:
            print(f"  {incident['severity']} {incident['state']} {incident['title']}")
        for problem in life.problems:
            print(f"error: {problem}")
        critical = [i for i in incidents if i["severity"] == "critical" and i["state"] != "aborted"]
        sys.exit(1 if critical or life.problems else 0)


main()
