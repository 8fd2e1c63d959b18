"""The driver of scripts/bench: see there. Every measured step appends one JSON line to $BENCH_DIR/results.jsonl; the
tables at the end hold `median (min-max)`. Tools are interleaved, round robin, so that noise hits them alike."""

import ctypes
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import psycopg2

DIR = os.environ["BENCH_DIR"]
PGBIN = os.environ["PGBIN"]
REPS = int(os.environ.get("REPS", "3"))
SCALE = int(os.environ.get("SCALE", "120"))            # pgbench scale: 120 makes a cluster of about 2 GB
LOAD_TX = int(os.environ.get("LOAD_TX", "60000"))      # transactions per client and half of the load
LAG_SECONDS = int(os.environ.get("LAG_SECONDS", "20"))
PORT, RESTORED_PORT, S3_PORT, HTTP_PORT = 5740, 5741, 3940, 5749
DATA, RUN, STASH, LOGS = f"{DIR}/pg/data", f"{DIR}/run", f"{DIR}/stash", f"{DIR}/logs"
RESULTS = f"{DIR}/results.jsonl"
SEGMENT = 16 << 20
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
S3_KEYS = {}
S3_PID = None


# ---- running and measuring -------------------------------------------------------------------------------------

def as_postgres(command, env=None, **options):
    env = {**os.environ, "HOME": f"{DIR}/home", "TMPDIR": f"{DIR}/tmp", "PGHOST": "127.0.0.1", "PGPORT": str(PORT),
           "PGUSER": "postgres", "PGDATABASE": "postgres", **S3_KEYS, **(env or {})}
    command = ["sh", "-c", command] if isinstance(command, str) else command
    drop = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]
    return subprocess.Popen(drop + command, env=env, **options)


def sh(command, env=None):
    p = as_postgres(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = p.communicate()
    if p.returncode:
        raise SystemExit(f"failed ({p.returncode}): {command}\n{out[-4000:]}")
    return out


def proc_stat(pid):
    with open(f"/proc/{pid}/stat") as f:
        s = f.read()
    return s[s.rindex(")") + 2:].split()


def cpu_of(pid):
    """CPU seconds of one live process, its reaped children included."""
    try:
        p = proc_stat(pid)
        return sum(int(x) for x in p[11:15]) / TICK
    except OSError:
        return 0.0


def machine_busy():
    with open("/proc/stat") as f:
        v = [int(x) for x in f.readline().split()[1:]]
    return (sum(v[:8]) - v[3] - v[4]) / TICK


def descendants(root):
    kids = {}
    for d in os.listdir("/proc"):
        if d.isdigit():
            try:
                kids.setdefault(int(proc_stat(d)[1]), []).append(int(d))
            except OSError:
                pass
    out, todo = [], [root]
    while todo:
        for k in kids.get(todo.pop(), []):
            out.append(k)
            todo.append(k)
    return out


class Sampler(threading.Thread):
    """Peak of the summed resident memory of process trees, every 40 ms."""

    def __init__(self, roots):
        super().__init__(daemon=True)
        self.roots, self.peak, self.done = roots, 0, threading.Event()

    def run(self):
        while not self.done.wait(0.04):
            total = 0
            for root in self.roots:
                for pid in [root] + descendants(root):
                    try:
                        with open(f"/proc/{pid}/statm") as f:
                            total += int(f.read().split()[1]) * PAGE
                    except OSError:
                        pass
            self.peak = max(self.peak, total)

    def stop(self):
        self.done.set()
        self.join()
        return self.peak


def metered(command, env=None, daemon=None):
    """Runs a command as postgres: wall, CPU of its whole tree (orphans too), peak memory, machine-wide busy CPU."""
    os.sync()
    busy, s3, beside = machine_busy(), cpu_of(S3_PID), cpu_of(daemon) if daemon else 0
    u0 = os.times()
    start = time.monotonic()
    p = as_postgres(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sampler = Sampler([p.pid] + ([daemon] if daemon else []))
    sampler.start()
    out, _ = p.communicate()
    wall = time.monotonic() - start
    while any_orphan(daemon):                            # asynchronous helpers belong to the price
        time.sleep(0.01)
    u1 = os.times()
    peak = sampler.stop()
    if p.returncode:
        raise SystemExit(f"failed ({p.returncode}): {command}\n{out[-4000:]}")
    cpu = u1.children_user + u1.children_system - u0.children_user - u0.children_system
    return {"wall": wall, "cpu": cpu + (cpu_of(daemon) - beside if daemon else 0), "rss": peak,
            "busy": machine_busy() - busy, "s3_cpu": cpu_of(S3_PID) - s3}, out


KEEP = set()                                             # our own long-lived children: servers and daemons


def any_orphan(daemon):
    """Reaps orphans; true while helpers of the measured command live. A server that a restore leaves running is none."""
    for pid in descendants(os.getpid()):
        try:
            if int(proc_stat(pid)[1]) == os.getpid() and pid not in KEEP and pid != daemon and not is_restored(pid):
                done, _ = os.waitpid(pid, os.WNOHANG)
                if done == 0:
                    return True
        except (OSError, ChildProcessError):
            pass
    return False


def is_restored(pid):
    with open(f"/proc/{pid}/cmdline") as f:
        return f"{DIR}/tmp/restored" in f.read().split("\0")


def record(**row):
    with open(RESULTS, "a") as f:
        f.write(json.dumps(row) + "\n")
    print("  " + " ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def sql(query, port=PORT):
    c = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    c.autocommit = True
    k = c.cursor()
    k.execute(query)
    rows = k.fetchall() if k.description else None
    c.close()
    return rows


def drop_slot(name):
    sql(f"select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '{name}' and not active")


def lsn(text):
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def du(path):
    return sum(os.lstat(os.path.join(d, f)).st_size for d, _, fs in os.walk(path) for f in fs)


# ---- the world: a cluster, an S3 server, TLS in front of it for pgBackRest --------------------------------------

def start_cluster():
    for d in ("pg", "stash", "home", "repo", "run", "tmp", "logs", "s3"):
        subprocess.run(["install", "-d", "-o", "postgres", "-g", "postgres", f"{DIR}/{d}"], check=True)
    if os.path.exists(DATA):
        subprocess.run(["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", f"{PGBIN}/pg_ctl", "-D", DATA,
                        "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(DATA)
    sh(f"{PGBIN}/initdb -k -D {DATA} -A trust -U postgres --locale=C -E UTF8")
    # pgBackRest backs up only where archive_command contains its name, hence the name of the script.
    script = f"{RUN}/archive-pgbackrest-etc.sh"
    with open(script, "w") as f:
        f.write(f"#!/bin/sh\nset -e\nif [ -e {RUN}/stash.on ]; then cp \"$1\" {STASH}/.$2 && mv {STASH}/.$2 {STASH}/$2; fi\n"
                f"[ -x {RUN}/archive.active ] || exit 0\nexec {RUN}/archive.active \"$1\" \"$2\"\n")
    os.chmod(script, 0o755)
    with open(f"{DATA}/postgresql.conf", "a") as f:
        f.write(f"port = {PORT}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{DIR}/tmp'\nshared_buffers = 2GB\n"
                "max_wal_size = 8GB\nmin_wal_size = 1GB\ncheckpoint_timeout = 15min\nwal_level = replica\narchive_mode = on\n"
                f"archive_command = '{script} %p %f'\nmax_wal_senders = 10\nlog_line_prefix = '%m [%p] '\n")
    sh(f"{PGBIN}/pg_ctl -D {DATA} -w -l {LOGS}/primary.log start")
    KEEP.add(int(open(f"{DATA}/postmaster.pid").readline()))
    # pgbench's own rows are blanks that compress 20:1; hexadecimal digests bring that to about 3:1, like real tables.
    sh(f"{PGBIN}/pgbench -i -I dt -F 90 -q")
    sql(f"insert into pgbench_branches select i, 0, '' from generate_series(1, {SCALE}) i;"
        f"insert into pgbench_tellers select i, (i - 1) / 10 + 1, 0, '' from generate_series(1, {SCALE * 10}) i;"
        "insert into pgbench_accounts select i, (i - 1) / 100000 + 1, 0, md5(i::text) || md5((i * 7)::text)"
        f" from generate_series(1, {SCALE * 100000}) i")
    sql("vacuum analyze")
    sh(f"{PGBIN}/pgbench -i -I p -q")
    sql("checkpoint")
    print("cluster of", sql("select pg_size_pretty(pg_database_size('postgres')), version()")[0], flush=True)


def start_s3():
    global S3_PID
    home = f"{DIR}/s3"
    subprocess.run(["install", "-d", home], check=True)
    log = open(f"{LOGS}/s3.log", "w")
    if os.environ["BENCH_S3"] == "garage":
        shutil.rmtree(f"{home}/garage", ignore_errors=True)
        conf, exe = f"{home}/garage.toml", f"{DIR}/bin/garage"
        with open(conf, "w") as f:
            f.write(f'metadata_dir = "{home}/garage/meta"\ndata_dir = "{home}/garage/data"\ndb_engine = "lmdb"\n'
                    'metadata_fsync = false\ndata_fsync = false\nblock_size = "4M"\ncompression_level = "none"\n'
                    f'replication_factor = 1\nrpc_bind_addr = "127.0.0.1:{S3_PORT + 1}"\n'
                    f'rpc_public_addr = "127.0.0.1:{S3_PORT + 1}"\nrpc_secret = "{7:064d}"\n[s3_api]\ns3_region = "garage"\n'
                    f'api_bind_addr = "127.0.0.1:{S3_PORT}"\nroot_domain = ".s3.garage.test"\n')
        p = subprocess.Popen([exe, "-c", conf, "server"], stdout=log, stderr=log)

        def g(*a):
            return subprocess.run([exe, "-c", conf, *a], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        while not (node := g("node", "id", "-q").split("@")[0]) or "HEALTHY" not in g("status"):
            time.sleep(0.2)
        g("layout", "assign", "-z", "dc1", "-c", "100G", node)
        g("layout", "apply", "--version", "1")
        g("bucket", "create", "bench")
        key = g("key", "create", "bench")
        S3_KEYS.update(AWS_ACCESS_KEY_ID=re.search(r"Key ID: *(\S+)", key)[1],
                       AWS_SECRET_ACCESS_KEY=re.search(r"Secret key: *(\S+)", key)[1])
        g("bucket", "allow", "--read", "--write", "--owner", "bench", "--key", S3_KEYS["AWS_ACCESS_KEY_ID"])
    else:
        shutil.rmtree(f"{home}/fs", ignore_errors=True)
        os.makedirs(f"{home}/fs/bench")
        S3_KEYS.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="benchsecret")
        p = subprocess.Popen([f"{DIR}/bin/s3s-fs", "--host", "127.0.0.1", "--port", str(S3_PORT), "--access-key", "bench",
                              "--secret-key", "benchsecret", f"{home}/fs"], stdout=log, stderr=log)
    S3_KEYS["AWS_REGION"] = "garage"
    S3_PID = p.pid
    KEEP.add(p.pid)
    # Debian's pgBackRest speaks only TLS to S3.
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost",
                    "-keyout", f"{home}/tls.pem", "-out", f"{home}/crt.pem"], check=True, stderr=subprocess.DEVNULL)
    with open(f"{home}/tls.pem", "a") as f:
        f.write(open(f"{home}/crt.pem").read())
    with open(f"{home}/stunnel.conf", "w") as f:
        f.write(f"foreground = yes\npid =\n[s3]\naccept = 127.0.0.1:{S3_PORT + 5}\nconnect = 127.0.0.1:{S3_PORT}\ncert = {home}/tls.pem\n")
    p = subprocess.Popen(["stunnel4", f"{home}/stunnel.conf"], stdout=log, stderr=log)
    KEEP.add(p.pid)
    time.sleep(1)


def stop_world(*_):
    for pid in list(KEEP):
        try:
            os.kill(pid, signal.SIGINT if os.path.exists(f"/proc/{pid}") else 0)
        except OSError:
            pass


def archive_with(script):
    path = f"{RUN}/archive.active"
    if script is None:
        if os.path.exists(path):
            os.unlink(path)
        return
    with open(path + ".new", "w") as f:
        f.write("#!/bin/sh\nset -e\n" + script + "\n")
    os.chmod(path + ".new", 0o755)
    os.rename(path + ".new", path)


# ---- the tools, all at zstd level 1 ------------------------------------------------------------------------------

class Tool:
    stores = ("local", "s3")

    def __init__(self, store, space):
        self.store, self.space = store, space
        self.key = f"{self.name}-{store}-{space}"

    def path(self):
        return f"{DIR}/repo/{self.key}"

    def fresh(self):
        shutil.rmtree(self.path(), ignore_errors=True)
        subprocess.run(["install", "-d", "-o", "postgres", self.path()], check=True)

    def stored(self):
        return du(self.path()) if self.store == "local" else None

    def env(self):
        return {}

    def close(self):
        if self.store == "local" and self.space != "gold":
            shutil.rmtree(self.path(), ignore_errors=True)

    def start_daemon(self, datadir):
        return None

    def stop_daemon(self):
        pass


class Walguard(Tool):
    name = "walguard"
    exe = f"{DIR}/bin/walguard"
    slot = "walguard"

    def config(self, tail="1s"):
        repo = f"file://{DIR}/repo" if self.store == "local" else "s3://bench/walguard"
        path = f"{RUN}/{self.key}.toml"
        with open(path, "w") as f:
            f.write(f'cluster = "{self.key}"\n[postgres]\nconninfo = "host=127.0.0.1 port={PORT} user=postgres dbname=postgres"\n'
                    f'slot = "{self.slot}"\n[repository]\nurl = "{repo}"\n')
            if self.store == "s3":
                f.write(f'[repository.s3]\nendpoint = "http://127.0.0.1:{S3_PORT}"\nregion = "garage"\npath_style = true\n')
            f.write(f'[spool]\ndir = "{DIR}/tmp/spool-{self.key}"\n[archive]\ntail_interval = "{tail}"\n'
                    f'[http]\nlisten = "127.0.0.1:{HTTP_PORT}"\n')
        return path

    def fresh(self):
        super().fresh()
        shutil.rmtree(f"{DIR}/tmp/spool-{self.key}", ignore_errors=True)
        self.ready()
        sh(self.command + " init")
        drop_slot("walguard")                              # a phase that streams makes its own, where it must begin

    def ready(self):
        self.command = f"{self.exe} --config {self.config()}"

    def backup(self):
        return f"{self.command} backup --no-wait --json", {}

    def push(self, datadir):
        return f"{self.command} wal-push %p"

    def agent(self, tail="1s"):
        log = open(f"{LOGS}/agent-{self.key}.log", "w")
        p = as_postgres(["sh", "-c", f"exec {self.exe} --config {self.config(tail)} run --no-backups"], stdout=log, stderr=log)
        KEEP.add(p.pid)
        return p

    def restore(self, dest, target):
        return f"{self.command} restore --to {target} --target-dir {dest} --start --action promote --yes " \
               f"--port {RESTORED_PORT} --pg-bin-dir {PGBIN}"


class PgBackRest(Tool):
    name = "pgbackrest"

    def config(self, pg=DATA, asynchronous=True):
        path = f"{RUN}/{self.key}.conf"
        with open(path, "w") as f:
            f.write("[global]\ncompress-type=zst\ncompress-level=1\nprocess-max=2\nlog-level-console=warn\nlog-level-file=off\n"
                    f"start-fast=y\nlock-path={DIR}/tmp/lock-{self.key}\nspool-path={DIR}/tmp/spool-{self.key}\n"
                    "archive-push-queue-max=64GiB\narchive-get-queue-max=1GiB\nrepo1-retention-full=9\n"
                    f"archive-async={'y' if asynchronous else 'n'}\n")
            if self.store == "local":
                f.write(f"repo1-path={self.path()}\n")
            else:
                f.write(f"repo1-type=s3\nrepo1-path=/{self.key}\nrepo1-s3-bucket=bench\nrepo1-s3-endpoint=127.0.0.1\n"
                        f"repo1-storage-port={S3_PORT + 5}\nrepo1-storage-verify-tls=n\nrepo1-s3-region=garage\nrepo1-s3-uri-style=path\n"
                        f"repo1-s3-key={S3_KEYS['AWS_ACCESS_KEY_ID']}\nrepo1-s3-key-secret={S3_KEYS['AWS_SECRET_ACCESS_KEY']}\n")
            f.write(f"[main]\npg1-path={pg}\npg1-port={PORT}\npg1-socket-path={DIR}/tmp\npg1-user=postgres\n")
        for d in ("lock", "spool"):
            subprocess.run(["install", "-d", "-o", "postgres", f"{DIR}/tmp/{d}-{self.key}"], check=True)
        self.command = f"pgbackrest --config={path} --stanza=main"

    def fresh(self):
        super().fresh()
        # A spool that outlives its repository would answer "archived" without pushing.
        shutil.rmtree(f"{DIR}/tmp/spool-{self.key}", ignore_errors=True)
        self.config()
        sh(self.command + " stanza-create")

    def ready(self):
        shutil.rmtree(f"{DIR}/tmp/spool-{self.key}", ignore_errors=True)
        self.config()

    def backup(self):
        self.config(asynchronous=False)
        archive_with(f"exec {self.command} archive-push $1")
        return self.command + " --type=full backup", {}

    def push(self, datadir):
        self.config()
        return f"{self.command} --pg1-path={datadir} archive-push %p"

    def restore(self, dest, target):
        return f"{self.command} --pg1-path={dest} --archive-mode=off --type=lsn --target={target} --target-action=promote restore"


class WalRus(Tool):
    name = "wal-rus"
    exe = f"{DIR}/bin/walrus"

    def env(self):
        env = {"WALG_COMPRESSION_METHOD": "zstd", "WALG_COMPRESSION_LEVEL": "1", "WALG_UPLOAD_CONCURRENCY": "2",
               "WALG_DOWNLOAD_CONCURRENCY": "2", "WALG_LOG_LEVEL": "ERROR"}
        if self.store == "local":
            env["WALG_FILE_PREFIX"] = self.path()
        else:
            env.update(WALG_S3_PREFIX=f"s3://bench/{self.key}", AWS_ENDPOINT=f"http://127.0.0.1:{S3_PORT}",
                       AWS_S3_FORCE_PATH_STYLE="true", **S3_KEYS)
        return env

    def ready(self):
        pass

    def backup(self):
        archive_with(None)
        return f"{self.exe} backup-push --full {DATA}", self.env()

    def start_daemon(self, datadir):
        socket = f"{DIR}/tmp/walrus.sock"
        if os.path.exists(socket):
            os.unlink(socket)
        log = open(f"{LOGS}/walrus-daemon.log", "w")
        self.daemon = as_postgres(["sh", "-c", f"cd {datadir} && exec {self.exe} daemon {socket}"],
                                  dict(self.env(), PGDATA=datadir), stdout=log, stderr=log)
        KEEP.add(self.daemon.pid)
        while not os.path.exists(socket):
            time.sleep(0.05)
        return self.daemon.pid

    def stop_daemon(self):
        self.daemon.terminate()
        self.daemon.wait()

    def push(self, datadir):
        return f"{self.exe} daemon-client --socket {DIR}/tmp/walrus.sock wal-push %p"

    def fetch(self):
        return f"{self.exe} daemon-client --socket {DIR}/tmp/walrus.sock wal-fetch %f %p"

    def restore(self, dest, target):
        return f"{self.exe} backup-fetch {dest} LATEST"


class PgBaseBackup(Tool):
    name = "pg_basebackup"
    stores = ("local",)

    def ready(self):
        pass

    def backup(self):
        archive_with(None)
        return f"{PGBIN}/pg_basebackup -c fast -Ft -X none --compress=client-zstd:level=1,workers=2 -D {self.path()}/base", {}


TOOLS = [Walguard, PgBackRest, WalRus, PgBaseBackup]


def rounds(tools, space):
    for rep in range(REPS):
        for cls in tools:
            for store in cls.stores:
                yield cls(store, f"{space}{rep}"), rep


# ---- phases --------------------------------------------------------------------------------------------------------

def phase_backup():
    print("== full base backup", flush=True)
    size = du(DATA) - du(f"{DATA}/pg_wal")
    for tool, rep in rounds(TOOLS, "backup"):
        tool.fresh()
        command, env = tool.backup()
        sql("checkpoint")
        m, _ = metered(command, env)
        record(phase="backup", tool=tool.name, store=tool.store, rep=rep, mb_s=size / 1e6 / m["wall"], stored=tool.stored(), **m)
        archive_with(None)
        tool.close()


def load():
    """Keeps a backup of every tool, then makes WAL to archive and to replay: a checkpoint in each half makes full-page
    images come twice. Runs once; push and restore share it."""
    if os.path.exists(f"{RUN}/target"):
        return
    print("== kept backups, and the load", flush=True)
    drop_slot("origin")
    sql("select pg_create_physical_replication_slot('origin', true)")
    open(f"{RUN}/stash.on", "w").close()
    sql("select pg_switch_wal()")
    with open(f"{RUN}/first", "w") as f:
        f.write(sql("select pg_walfile_name(pg_current_wal_lsn())")[0][0])
    for cls in (Walguard, PgBackRest, WalRus):
        for store in cls.stores:
            tool = cls(store, "gold")
            tool.fresh()
            command, env = tool.backup()
            metered(command, env)
            archive_with(None)
    with open(f"{RUN}/mark", "w") as f:
        f.write(sql("select pg_walfile_name(pg_current_wal_lsn())")[0][0])
    for _ in range(2):
        sql("checkpoint")
        sh(f"PGOPTIONS='-c synchronous_commit=off' {PGBIN}/pgbench -n -c 4 -j 1 -M prepared -t {LOAD_TX}")
    expect = sql("select count(*), sum(abalance) from pgbench_accounts")[0]
    target = sql("select pg_current_wal_insert_lsn()")[0][0]
    sql("update pgbench_branches set filler = 'after the target'")
    sql("select pg_switch_wal()")
    while any(f.endswith(".ready") for f in os.listdir(f"{DATA}/pg_wal/archive_status")):
        time.sleep(0.2)
    os.unlink(f"{RUN}/stash.on")
    with open(f"{RUN}/expect", "w") as f:
        json.dump([int(x) for x in expect], f)
    with open(f"{RUN}/target", "w") as f:
        f.write(target)


def stashed(since):
    first = open(f"{RUN}/{since}").read()
    return sorted(f for f in os.listdir(STASH) if re.fullmatch("[0-9A-F]{24}", f) and f >= first)


def wal_box(names):
    """A data directory as an archiver sees it: segments in pg_wal, each marked ready."""
    box = f"{DIR}/tmp/box"
    shutil.rmtree(box, ignore_errors=True)
    shutil.copytree(f"{DATA}/global", f"{box}/global")
    shutil.copy(f"{DATA}/PG_VERSION", box)
    os.makedirs(f"{box}/pg_wal/archive_status")
    for name in names:
        shutil.copy(f"{STASH}/{name}", f"{box}/pg_wal/{name}")
        open(f"{box}/pg_wal/archive_status/{name}.ready", "w").close()
    subprocess.run(["chown", "-R", "postgres:postgres", box], check=True)
    os.chmod(box, 0o700)
    return box


# The server's part around an archive_command: one segment at a time, oldest first, `.ready` to `.done`.
PUSHER = r"""
import os, sys
box, command = sys.argv[1], sys.argv[2]
os.chdir(box)
status = "pg_wal/archive_status"
for ready in sorted(f for f in os.listdir(status) if f.endswith(".ready")):
    name = ready[:-6]
    if not os.path.exists(f"{status}/{ready}"):
        continue  # marked done by the tool itself, as the server allows
    for tries in range(5):
        if os.system(command.replace("%p", "pg_wal/" + name).replace("%f", name)) == 0:
            break
    else:
        sys.exit("archive command failed: " + name)
    try:
        os.rename(f"{status}/{ready}", f"{status}/{name}.done")
    except FileNotFoundError:
        pass
"""


def push(tool, names):
    box = wal_box(names)
    daemon = tool.start_daemon(box)
    try:
        m, _ = metered(["/usr/bin/python3", "-c", PUSHER, box, tool.push(box)], tool.env(), daemon)
    finally:
        if daemon:
            tool.stop_daemon()
            KEEP.discard(daemon)
    return m


def http_status():
    with urllib.request.urlopen(f"http://127.0.0.1:{HTTP_PORT}/status", timeout=5) as r:
        return json.load(r)


def archived():
    try:
        position = http_status()["archived"]
        return lsn(position["lsn"]) if position else 0
    except (OSError, KeyError):
        return 0


def stream(tool, end):
    """The agent, from its start until the WAL that waits in the slot is all in the repository."""
    drop_slot("walguard")
    sql("select pg_copy_physical_replication_slot('origin', 'walguard')")
    os.sync()
    busy, s3, start = machine_busy(), cpu_of(S3_PID), time.monotonic()
    agent = tool.agent()
    sampler = Sampler([agent.pid])
    sampler.start()
    while archived() < end:
        if agent.poll() is not None:
            raise SystemExit(f"the agent ended: see {LOGS}")
        time.sleep(0.05)
    m = {"wall": time.monotonic() - start, "cpu": cpu_of(agent.pid), "rss": sampler.stop(), "busy": machine_busy() - busy,
         "s3_cpu": cpu_of(S3_PID) - s3}
    agent.terminate()
    agent.wait()
    KEEP.discard(agent.pid)
    return m


def receivewal(end):
    drop_slot("receivewal")
    sql("select pg_copy_physical_replication_slot('origin', 'receivewal')")
    shutil.rmtree(f"{DIR}/tmp/receivewal", ignore_errors=True)
    subprocess.run(["install", "-d", "-o", "postgres", f"{DIR}/tmp/receivewal"], check=True)
    text = sql(f"select '0/0'::pg_lsn + {end}")[0][0]
    m, _ = metered(f"{PGBIN}/pg_receivewal -D {DIR}/tmp/receivewal --slot receivewal --endpos {text} --no-loop")
    sql("select pg_drop_replication_slot('receivewal')")
    return m


def phase_push():
    load()
    names = stashed("mark")[:64]
    print(f"== WAL archiving: {len(names)} segments by archive_command; the whole load by streaming", flush=True)
    mib = len(names) * 16
    waiting = stashed("first")
    begin = lsn(sql("select restart_lsn from pg_replication_slots where slot_name = 'origin'")[0][0])
    end = (int(waiting[-1][8:16], 16) * 256 + int(waiting[-1][16:], 16) + 1) * SEGMENT
    streamed = (end - begin) / (1 << 20)
    for rep in range(REPS):
        for store in ("local", "s3"):
            tool = Walguard(store, f"stream{rep}")
            tool.fresh()
            m = stream(tool, end)
            record(phase="push", tool="walguard run", store=store, rep=rep, mib_s=streamed / m["wall"],
                   cpu_s_per_gib=m["cpu"] / streamed * 1024, stored=tool.stored(), **m)
            tool.close()
        m = receivewal(end)
        record(phase="push", tool="pg_receivewal", store="local", rep=rep, mib_s=streamed / m["wall"],
               cpu_s_per_gib=m["cpu"] / streamed * 1024, stored=None, **m)
        for cls in (Walguard, PgBackRest, WalRus):
            for store in cls.stores:
                tool = cls(store, f"push{rep}")
                tool.fresh()
                m = push(tool, names)
                name = {"walguard": "walguard wal-push", "wal-rus": "wal-rus daemon"}.get(cls.name, cls.name)
                record(phase="push", tool=name, store=store, rep=rep, mib_s=mib / m["wall"],
                       cpu_s_per_gib=m["cpu"] / mib * 1024, stored=tool.stored(), **m)
                tool.close()


def lag_run(name, store, rate, tail, rep):
    """pgbench beside the agent: for each sampled flush position, the time until the repository holds it."""
    tool = Walguard(store, f"lag{rep}{rate}{tail}")
    tool.fresh()
    drop_slot("walguard")
    agent = tool.agent(tail)
    flush = "select pg_current_wal_flush_lsn()"
    while archived() < lsn(sql(flush)[0][0]):
        time.sleep(0.05)
    samples, done = [], threading.Event()

    def sample():
        c = psycopg2.connect(host="127.0.0.1", port=PORT, user="postgres", dbname="postgres")
        c.autocommit = True
        k = c.cursor()
        while not done.wait(0.02):
            k.execute(flush)
            flushed = lsn(k.fetchone()[0])
            samples.append((time.monotonic(), flushed, archived()))
    thread = threading.Thread(target=sample)
    thread.start()
    tps = None
    if rate == "quiet":                                    # one small commit every 1.3 s, alone on the server
        for i in range(LAG_SECONDS * 10 // 13):
            sql(f"update pgbench_branches set bbalance = {i} where bid = 1")
            time.sleep(1.3)
    else:
        limit = "" if rate == "full" else f" -R {rate}"
        out = sh(f"{PGBIN}/pgbench -n -c 4 -j 1 -M prepared -T {LAG_SECONDS}{limit}")
        tps = float(re.search(r"tps = ([\d.]+)", out)[1])
    time.sleep(2.5)
    done.set()
    thread.join()
    lags, j, last = [], 0, 0
    for at, flushed, _ in samples[:-100]:
        if flushed == last:
            continue                                       # nothing was committed since: not a commit
        last = flushed
        while j < len(samples) and samples[j][2] < flushed:
            j += 1
        if j < len(samples):
            lags.append(max(0.0, samples[j][0] - at))
    lags.sort()
    q = lambda share: lags[min(len(lags) - 1, int(share * len(lags)))]
    record(phase="lag", tool=name, store=store, rate=rate, tail=tail, rep=rep, tps=tps, p50=q(.5), p99=q(.99), max=lags[-1], n=len(lags))
    agent.terminate()
    agent.wait()
    KEEP.discard(agent.pid)
    tool.close()


def phase_lag():
    print("== seconds from commit until durable in the repository", flush=True)
    for rep in range(REPS):
        for tail in ("1s", "250ms"):
            for rate in ("full", "300", "quiet"):
                lag_run("walguard run", "s3", rate, tail, rep)


def start_restored(dest, port=RESTORED_PORT):
    """Starts a restored server and waits until it accepts writes."""
    start = time.monotonic()
    log = f"{LOGS}/restored.log"
    sh(f"{PGBIN}/pg_ctl -D {dest} -W -l {log} -o '-p {port}' start")
    while True:
        try:
            if not sql("select pg_is_in_recovery()", port)[0][0]:
                return time.monotonic() - start
        except psycopg2.OperationalError:
            if "FATAL" in open(log).read() and not os.path.exists(f"{dest}/postmaster.pid"):
                raise SystemExit(open(log).read()[-3000:])
        time.sleep(0.05)


def phase_restore():
    load()
    print("== restore to an LSN, from the command until writes are accepted", flush=True)
    target = open(f"{RUN}/target").read()
    expect = json.load(open(f"{RUN}/expect"))
    names = stashed("first")
    end = (int(names[-1][8:16], 16) * 256 + int(names[-1][16:], 16) + 1) * SEGMENT
    for store in ("local", "s3"):                          # the kept repositories get the WAL, unmeasured
        tool = Walguard(store, "gold")
        tool.ready()
        stream(tool, end)
        for cls in (PgBackRest, WalRus):
            tool = cls(store, "gold")
            tool.ready()
            push(tool, names)
    for rep in range(REPS):
        for cls in (Walguard, PgBackRest, WalRus):
            for store in cls.stores:
                tool = cls(store, "gold")
                tool.ready()
                dest, log = f"{DIR}/tmp/restored", f"{LOGS}/restored.log"
                subprocess.run(["rm", "-rf", dest, log], check=True)
                if cls is not Walguard:
                    subprocess.run(["install", "-d", "-m", "700", "-o", "postgres", dest], check=True)
                m, out = metered(tool.restore(dest, target), tool.env())
                base, daemon = m["wall"], None
                if cls is WalRus:
                    daemon = tool.start_daemon(dest)
                    with open(f"{dest}/postgresql.auto.conf", "a") as f:
                        f.write(f"\nrestore_command = '{tool.fetch()}'\nrecovery_target_lsn = '{target}'\n"
                                "recovery_target_action = 'promote'\narchive_mode = off\n")
                    sh(f"touch {dest}/recovery.signal")
                if cls is not Walguard:
                    m["wall"] += start_restored(dest)
                if daemon:
                    tool.stop_daemon()
                    KEEP.discard(daemon)
                got = [int(x) for x in sql("select count(*), sum(abalance) from pgbench_accounts", RESTORED_PORT)[0]]
                if got != expect:
                    raise SystemExit(f"{cls.name}: {got} instead of {expect}")
                sh(f"{PGBIN}/pg_ctl -D {dest} -m immediate -w stop")
                record(phase="restore", tool=cls.name, store=store, rep=rep, base=base, **m)


def phase_memory():
    """One agent while 4 GiB of WAL and a base backup go through."""
    load()
    print("== memory of one agent: base backup and the WAL of the load, and more until 4 GiB went through", flush=True)
    tool = Walguard("s3", "memory")
    tool.fresh()
    drop_slot("walguard")
    sql("select pg_copy_physical_replication_slot('origin', 'walguard')")
    begin = lsn(sql("select restart_lsn from pg_replication_slots where slot_name = 'walguard'")[0][0])
    log = open(f"{LOGS}/agent-memory.log", "w")
    agent = as_postgres(["sh", "-c", f"exec {tool.exe} --config {tool.config()} run"], stdout=log, stderr=log)
    KEEP.add(agent.pid)
    while lsn(sql("select pg_current_wal_lsn()")[0][0]) - begin < 4 << 30:
        sql("checkpoint")
        sh(f"PGOPTIONS='-c synchronous_commit=off' {PGBIN}/pgbench -n -c 4 -j 1 -M prepared -t 20000")
    end = lsn(sql("select pg_current_wal_flush_lsn()")[0][0])
    while archived() < end or not http_status()["backups"]["last"]:
        if agent.poll() is not None:
            raise SystemExit(f"the agent ended: see {LOGS}")
        time.sleep(0.2)
    peak = int(re.search(r"VmHWM:\s+(\d+)", open(f"/proc/{agent.pid}/status").read())[1]) / 1024
    record(phase="memory", tool="walguard run", store="s3", wal_gib=(end - begin) / (1 << 30), peak_mib=peak)
    agent.terminate()
    agent.wait()
    KEEP.discard(agent.pid)


# ---- tables --------------------------------------------------------------------------------------------------------

def cell(values, digits=2):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    low, high = min(values), max(values)
    mid = f"{statistics.median(values):.{digits}f}"
    return mid if low == high else f"{mid} ({low:.{digits}f}-{high:.{digits}f})"


def report():
    rows = [json.loads(line) for line in open(RESULTS)]
    columns = {
        "backup": [("wall s", "wall", 1), ("MB/s", "mb_s", 0), ("CPU s", "cpu", 1), ("machine busy s", "busy", 1), ("peak MiB", "rss", 2 ** -20), ("stored MiB", "stored", 2 ** -20)],
        "push": [("MiB/s", "mib_s", 0), ("CPU s/GiB", "cpu_s_per_gib", 1), ("wall s", "wall", 1), ("machine busy s", "busy", 1), ("peak MiB", "rss", 2 ** -20)],
        "lag": [("p50 s", "p50", 2), ("p99 s", "p99", 2), ("max s", "max", 2), ("tps", "tps", 0)],
        "restore": [("total s", "wall", 1), ("first command s", "base", 1), ("CPU of the tool s", "cpu", 1), ("machine busy s", "busy", 1), ("peak MiB", "rss", 2 ** -20)],
        "memory": [("WAL GiB", "wal_gib", 1), ("peak MiB", "peak_mib", 0)],
    }
    for phase, cols in columns.items():
        groups = {}
        for r in rows:
            if r["phase"] == phase:
                groups.setdefault((r["store"], r["tool"], r.get("rate", ""), r.get("tail", "")), []).append(r)
        if not groups:
            continue
        print(f"\n### {phase}\n\n| tool | repository |" + "".join(f" {c[0]} |" for c in cols))
        print("|---|---|" + "---|" * len(cols))
        for (store, tool, rate, tail), rs in sorted(groups.items()):
            label = tool + (f", rate {rate}, tail_interval {tail}" if rate else "")
            out = []
            for _, key, spec in cols:
                values = [r.get(key) for r in rs]
                if isinstance(spec, float):
                    out.append(cell([v * spec if v is not None else None for v in values], 0))
                else:
                    out.append(cell(values, spec))
            print(f"| {label} | {store} | " + " | ".join(out) + " |")


def main():
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)               # PR_SET_CHILD_SUBREAPER: orphaned helpers are reaped here
    os.chdir("/")
    phases = sys.argv[1:] or ["backup", "lag", "push", "restore", "memory"]
    if phases != ["report"]:
        for f in glob.glob(f"{RUN}/*") + [RESULTS]:
            if os.path.isfile(f):
                os.unlink(f)
        shutil.rmtree(STASH, ignore_errors=True)
        shutil.rmtree(f"{DIR}/repo", ignore_errors=True)
        try:
            start_cluster()
            start_s3()
            for phase in phases:
                globals()[f"phase_{phase}"]()
        finally:
            stop_world()
    report()


if __name__ == "__main__":
    main()
