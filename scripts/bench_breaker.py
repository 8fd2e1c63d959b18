"""Measures how soon a large DELETE is announced and ended; see scripts/bench-breaker, which sets everything up."""

import os
import sys
import time

import psycopg2

from stage import WALGUARD, Webhook, dsn, free_port, process, scratch, server, status, wait, wait_caught_up

ROWS = int(os.environ.get("ROWS", "5000000"))


def measure(postgres, space, sql, breaker):
    """One DELETE of all rows by a session of its own; gives what is wrong with what came of it."""
    table = f"wiped_{breaker}"
    sql.execute(f"CREATE TABLE {table} AS SELECT i AS id, md5(i::text) AS note FROM generate_series(1, {ROWS}) i")
    sql.execute(f"VACUUM ANALYZE {table}")
    sql.execute("CHECKPOINT")
    config, port, hook = os.path.join(space, f"{breaker}.toml"), free_port(), Webhook()
    with open(config, "w") as out:
        out.write(
            f'cluster = "{breaker}"\n[postgres]\nconninfo = "{dsn(postgres)}"\nslot = "{breaker}"\n'
            f'[repository]\nurl = "file://{space}/repo"\n[spool]\ndir = "{space}/spool"\n[backup]\ninterval = "0s"\n'
            f'[http]\nlisten = "127.0.0.1:{port}"\n[detect]\nbreaker = "{breaker}"\n{hook.settings()}'
        )
    log = open(os.path.join(space, f"{breaker}.log"), "w")
    with process([WALGUARD, "run", "--config", config], stdout=log, stderr=log):
        wait_caught_up(sql, port)
        wait("rows to be counted", lambda: (status(port).get("detect") or {}).get("tables", 0) >= 1)
        session = psycopg2.connect(dsn(postgres) + " application_name=mistake")
        began, outcome = time.time(), "committed"
        try:
            session.cursor().execute(f"DELETE FROM {table}")
            deleted = time.time()
            session.commit()
        except psycopg2.OperationalError:
            outcome, deleted = "ended", time.time()
        ended = time.time()
        state = "aborted" if outcome == "ended" else "committed"
        wait("the last word", lambda: any(said["state"] == state for _, said in hook.came), 60)
    first_at, first = hook.came[0]
    last = hook.came[-1][1]
    sql.execute(f"SELECT count(*) FROM {table}")
    left = sql.fetchone()[0]
    print(f"| {breaker} | {ROWS:,} | {first_at - began:.2f} | {deleted - began:.2f} | {ended - began:.2f} | {outcome} "
          f"| {left:,} | {first['who'] or ''}; {first['query'] or ''} | {last['title']} |", flush=True)
    problems = []
    # Whoever ends it need not wait for the message.
    if breaker == "off" and first_at >= ended:
        problems.append("it was announced only when it was over")
    if "mistake" not in (first["who"] or "") and not any("mistake" in (said["who"] or "") for _, said in hook.came):
        problems.append("nobody was told who it was")
    if breaker == "terminate" and left != ROWS:
        problems.append("rows are lost")
    hook.shutdown()
    return [f"breaker {breaker}: {problem}" for problem in problems]


def main():
    with scratch("breaker") as space, server(space, "data", "max_wal_size=4GB") as postgres:
        connection = psycopg2.connect(dsn(postgres))
        connection.autocommit = True
        print("| breaker | rows | announced s | DELETE ended s | answered s | outcome | rows left | who, by the first message "
              "| the last message |\n|---|---|---|---|---|---|---|---|---|", flush=True)
        problems = [p for breaker in ("off", "terminate") for p in measure(postgres, space, connection.cursor(), breaker)]
    sys.exit("\n".join(f"error: {problem}" for problem in problems) or 0)


main()
