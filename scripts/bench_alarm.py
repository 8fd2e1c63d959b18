"""Measures from COMMIT to webhook; see scripts/bench-alarm, which sets everything up."""

import os
import statistics
import subprocess
import time
import urllib.request

import psycopg2

from stage import WALGUARD, Webhook, dsn, free_port, pgbench, process, run, scratch, server, wait, wait_caught_up

MOTO = os.environ["MOTO_SERVER"]
INCIDENTS = int(os.environ.get("INCIDENTS", "200"))
CLIENTS = int(os.environ.get("CLIENTS", "2"))
# Between two wipes, in seconds.
PAUSE = float(os.environ.get("PAUSE", "0.05"))


def measure(name, repo_settings, env, space):
    """One server, one agent, one repository, INCIDENTS wipes, each by a session of its own on a table of its own."""
    with server(space, name) as postgres:
        run(pgbench(postgres, "-i", "-q", "-s", "10"))
        wipe(name, repo_settings, env, postgres, space)


def first_told(hook):
    """When the first message about each table came, and of which incident."""
    told = {}
    for at, said in list(hook.came):
        for table in said["tables"]:
            if table["name"].endswith(".t"):
                told.setdefault(table["name"], (at, said["incident"]))
    return told


def wipe(name, repo_settings, env, postgres, space):
    hook = Webhook()
    connection = psycopg2.connect(dsn(postgres))
    connection.autocommit = True
    sql = connection.cursor()
    tables = [f"{name}_{number:04}" for number in range(INCIDENTS)]
    for schema in tables:
        sql.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.t AS SELECT generate_series(1, 20) AS id")
    sql.execute("ANALYZE")
    port = free_port()
    config = os.path.join(space, f"{name}.toml")
    with open(config, "w") as out:
        out.write(
            f'cluster = "{name}"\n[postgres]\nconninfo = "{dsn(postgres)}"\nslot = "{name}"\n'
            f'[spool]\ndir = "{space}/spool"\n[backup]\ninterval = "0s"\n[http]\nlisten = "127.0.0.1:{port}"\n'
            f'{repo_settings}{hook.settings()}'
        )
    log = open(os.path.join(space, f"{name}.log"), "w")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    agent = [WALGUARD, "run", "--config", config]
    with (
        process(pgbench(postgres, "-n", "-c", str(CLIENTS), "-T", "3600"), **quiet),
        process(agent, env={**os.environ, **env}, stdout=log, stderr=log),
    ):
        wait_caught_up(sql, port)
        committed = {}
        for schema in tables:
            session = psycopg2.connect(dsn(postgres))
            cursor = session.cursor()
            cursor.execute(f"DELETE FROM {schema}.t")
            session.commit()
            committed[schema] = time.time()
            session.close()
            time.sleep(PAUSE)
        wait("all alarms", lambda: len(first_told(hook)) >= len(tables), 120)
    told = {schema: first_told(hook)[f"postgres.{schema}.t"] for schema in tables}
    delays = sorted(1000 * (at - committed[schema]) for schema, (at, _) in told.items())
    incidents = len({incident for _, incident in told.values()})
    at = lambda share: delays[min(len(delays) - 1, int(share * len(delays)))]
    print(
        f"| {name} | {len(delays)} | {incidents} | {statistics.median(delays):.0f} | {at(0.9):.0f} | {at(0.99):.0f} "
        f"| {delays[-1]:.0f} |",
        flush=True,
    )
    hook.shutdown()


def main():
    with scratch("alarm") as space:
        print("| repository | wipes | incidents | median ms | 90 % ms | 99 % ms | most ms |")
        print("|---|---|---|---|---|---|---|", flush=True)
        measure("directory", f'[repository]\nurl = "file://{space}/repo"\n', {}, space)
        moto_port = free_port()
        endpoint = f"http://127.0.0.1:{moto_port}"
        moto = subprocess.Popen(
            [MOTO, "-H", "127.0.0.1", "-p", str(moto_port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            def bucket():
                request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
                try:
                    return urllib.request.urlopen(request, timeout=5).status == 200
                except OSError:
                    return False

            wait("the S3 server", bucket)
            keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
            s3 = f'[repository.s3]\nendpoint = "{endpoint}"\npath_style = true\n'
            measure("s3", f'[repository]\nurl = "s3://bench/alarm"\n{s3}', keys, space)
        finally:
            moto.terminate()


main()
