"""Measures from COMMIT to webhook; see scripts/bench-alarm, which sets everything up."""

import http.server
import json
import os
import pwd
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import psycopg2

PGBIN, WALGUARD, MOTO = os.environ["PGBIN"], os.environ["WALGUARD"], os.environ["MOTO_SERVER"]
INCIDENTS = int(os.environ.get("INCIDENTS", "200"))
CLIENTS = int(os.environ.get("CLIENTS", "2"))
USER = pwd.getpwnam("postgres") if os.geteuid() == 0 else None


def as_postgres(command, **options):
    """The server refuses to run as root."""
    if USER:
        options["user"], options["group"], options["extra_groups"] = USER.pw_uid, USER.pw_gid, []
    return subprocess.Popen(command, cwd="/", **options)


def run(command, **options):
    process = as_postgres(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    _, error = process.communicate()
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: {error.decode()}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Webhook(http.server.BaseHTTPRequestHandler):
    """Keeps when the first message about each table came."""

    came = {}

    def do_POST(self):
        at = time.time()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        for table in body.get("tables", []):
            Webhook.came.setdefault(table["name"], (at, body["incident"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def wait(what, condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            sys.exit(f"error: waited {seconds} s in vain for {what}")
        time.sleep(0.05)


def status(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return {}


def measure(name, repo_settings, env, dsn, space, load):
    """One agent, one repository, INCIDENTS wipes, each by a session of its own on a table of its own."""
    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    sql = connection.cursor()
    tables = []
    for number in range(INCIDENTS):
        schema = f"{name}_{number:04}"
        sql.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.t AS SELECT generate_series(1, 20) AS id")
        tables.append(schema)
    sql.execute("ANALYZE")
    port = free_port()
    config = os.path.join(space, f"{name}.toml")
    with open(config, "w") as out:
        out.write(
            f'cluster = "{name}"\n[postgres]\nconninfo = "{dsn}"\nslot = "{name}"\n[spool]\ndir = "{space}/spool"\n'
            f'[backup]\ninterval = "0s"\n[http]\nlisten = "127.0.0.1:{port}"\n{repo_settings}'
            f'[notify.hook]\nkind = "webhook"\nurl = "http://127.0.0.1:{hook.server_port}/"\n'
        )
    log = open(os.path.join(space, f"{name}.log"), "w")
    agent = as_postgres([WALGUARD, "run", "--config", config], env={**os.environ, **env}, stdout=log, stderr=log)
    pgbench = as_postgres(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        sql.execute("SELECT pg_current_wal_flush_lsn()::text")
        goal = sql.fetchone()[0]

        def caught_up():
            position = (status(port).get("scan") or {}).get("position") or {}
            sql.execute("SELECT %s::pg_lsn >= %s::pg_lsn", (position.get("lsn", "0/0"), goal))
            return sql.fetchone()[0]

        wait("the agent to have caught up", caught_up)
        committed = {}
        for schema in tables:
            session = psycopg2.connect(dsn)
            cursor = session.cursor()
            cursor.execute(f"DELETE FROM {schema}.t")
            session.commit()
            committed[schema] = time.time()
            session.close()
            time.sleep(0.05)
        table = lambda schema: f"postgres.{schema}.t"
        wait("all alarms", lambda: all(table(schema) in Webhook.came for schema in tables), 120)
        delays = sorted(1000 * (Webhook.came[table(schema)][0] - committed[schema]) for schema in tables)
        incidents = len({Webhook.came[table(schema)][1] for schema in tables})
        at = lambda share: delays[min(len(delays) - 1, int(share * len(delays)))]
        print(
            f"| {name} | {len(delays)} | {incidents} | {statistics.median(delays):.0f} | {at(0.9):.0f} | {at(0.99):.0f} "
            f"| {delays[-1]:.0f} |",
            flush=True,
        )
    finally:
        for process in (pgbench, agent):
            process.send_signal(signal.SIGTERM)
            process.wait()
        sql.execute("SELECT pg_drop_replication_slot(%s)", (name,))
        hook.shutdown()


def main():
    space = tempfile.mkdtemp(prefix="walguard-alarm-")
    os.chmod(space, 0o755)
    if USER:
        shutil.chown(space, "postgres")
    port, data = free_port(), os.path.join(space, "data")
    dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    run([f"{PGBIN}/initdb", "-U", "postgres", "-A", "trust", "-N", "-D", data])
    options = f"-p {port} -k {space} -c listen_addresses=127.0.0.1 -c shared_buffers=256MB"
    run([f"{PGBIN}/pg_ctl", "-w", "-D", data, "-l", os.path.join(space, "server.log"), "-o", options, "start"])
    moto_port = free_port()
    moto = subprocess.Popen(
        [MOTO, "-H", "127.0.0.1", "-p", str(moto_port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        connect = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
        run([f"{PGBIN}/pgbench", *connect, "-i", "-q", "-s", "10", "postgres"])
        load = [f"{PGBIN}/pgbench", *connect, "-n", "-c", str(CLIENTS), "-T", "3600", "postgres"]
        print("| repository | wipes | incidents | median ms | 90 % ms | 99 % ms | most ms |")
        print("|---|---|---|---|---|---|---|", flush=True)
        measure("directory", f'[repository]\nurl = "file://{space}/repo"\n', {}, dsn, space, load)
        endpoint = f"http://127.0.0.1:{moto_port}"

        def bucket():
            request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
            try:
                return urllib.request.urlopen(request, timeout=5).status == 200
            except OSError:
                return False

        wait("the S3 server", bucket)
        keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
        settings = f'[repository]\nurl = "s3://bench/alarm"\n[repository.s3]\nendpoint = "{endpoint}"\npath_style = true\n'
        measure("s3", settings, keys, dsn, space, load)
    finally:
        moto.terminate()
        subprocess.run([f"{PGBIN}/pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False,
                       stdout=subprocess.DEVNULL, **({"user": "postgres"} if USER else {}))
        if not os.environ.get("KEEP"):
            shutil.rmtree(space, ignore_errors=True)


main()
