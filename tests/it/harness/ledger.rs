//! A workload that knows, for each of its commits, what the database must contain after it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio_postgres::Client;
use walguard::pg::Lsn;

use super::Cluster;

/// What the ledger holds: amount by account.
pub(crate) type Amounts = BTreeMap<i64, i64>;

/// One committed transaction of the ledger.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    /// 1, 2, 3 ...; the transaction wrote it into the database too.
    pub(crate) number: i64,
    pub(crate) xid: u32,
    /// Time in its commit record.
    pub(crate) time: Timestamp,
    /// A position after its commit record and before the next commit of the ledger.
    pub(crate) after: Lsn,
    changes: Vec<(i64, Option<i64>)>,
}

/// The workload. One session writes, so that the order of commits is known; what others write beside it does not matter.
#[derive(Debug)]
pub(crate) struct Ledger {
    client: Client,
    commits: Vec<Commit>,
    amounts: Amounts,
    random: fastrand::Rng,
}

impl Ledger {
    /// Makes the ledger's tables. The same seed makes the same transactions.
    pub(crate) async fn create(cluster: &Cluster, seed: u64) -> Self {
        let client = cluster.client().await;
        client
            .batch_execute(
                "CREATE TABLE ledger (account bigint PRIMARY KEY, amount bigint NOT NULL, note text);
                 CREATE TABLE ledger_commits (number bigint PRIMARY KEY)",
            )
            .await
            .unwrap();
        Self { client, commits: Vec::new(), amounts: Amounts::new(), random: fastrand::Rng::with_seed(seed) }
    }

    /// Goes on at another server: the standby that was promoted, or the old one after a restart.
    pub(crate) async fn follow(&mut self, cluster: &Cluster) {
        self.client = cluster.client().await;
    }

    /// Commits a transaction with some inserts, updates and deletes, a subtransaction that is rolled back and one that is
    /// not; now and then it rolls back a whole transaction first.
    pub(crate) async fn commit(&mut self) -> Commit {
        if self.random.u8(..5) == 0 {
            let sql = "BEGIN; INSERT INTO ledger SELECT g, 0, 'rolled back' FROM generate_series(-50, -1) g; ROLLBACK";
            self.client.batch_execute(sql).await.unwrap();
        }
        let number = self.commits.len() as i64 + 1;
        let changes = self.changes();
        let mut sql = format!("BEGIN; INSERT INTO ledger_commits VALUES ({number});");
        for (at, (account, amount)) in changes.iter().enumerate() {
            if at == changes.len() / 2 {
                sql += "SAVEPOINT undone; DELETE FROM ledger; ROLLBACK TO undone; SAVEPOINT kept;";
            }
            sql += &match amount {
                Some(amount) => format!(
                    "INSERT INTO ledger VALUES ({account}, {amount}, repeat('{account} ', 20))
                     ON CONFLICT (account) DO UPDATE SET amount = excluded.amount;"
                ),
                None => format!("DELETE FROM ledger WHERE account = {account};"),
            };
        }
        self.client.batch_execute(&sql).await.unwrap();
        let xid: String = self.client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap().get(0);
        self.client.batch_execute("COMMIT").await.unwrap();
        // The full transaction id carries its epoch above 32 bits.
        let xid = (xid.parse::<u64>().unwrap() & 0xFFFF_FFFF) as u32;
        let sql = "SELECT pg_xact_commit_timestamp($1::text::xid), pg_current_wal_insert_lsn()::text";
        let row = self.client.query_one(sql, &[&xid.to_string()]).await.unwrap();
        let commit = Commit { number, xid, time: row.get(0), after: row.get::<_, String>(1).parse().unwrap(), changes };
        apply(&mut self.amounts, &commit);
        self.commits.push(commit.clone());
        commit
    }

    /// Commits so many transactions.
    pub(crate) async fn run(&mut self, commits: usize) {
        for _ in 0..commits {
            self.commit().await;
        }
    }

    fn changes(&mut self) -> Vec<(i64, Option<i64>)> {
        let count = 1 + self.random.usize(..8);
        let random = &mut self.random;
        (0..count).map(|_| (random.i64(..200), (random.u8(..4) > 0).then(|| random.i64(..1_000_000)))).collect()
    }

    /// All commits so far.
    pub(crate) fn commits(&self) -> &[Commit] {
        &self.commits
    }

    /// What the ledger holds after commit `number`; 0 is before the first.
    pub(crate) fn at(&self, number: i64) -> Amounts {
        let mut amounts = Amounts::new();
        self.commits.iter().take_while(|commit| commit.number <= number).for_each(|commit| apply(&mut amounts, commit));
        amounts
    }

    /// Checks that a database holds exactly what it must after commit `number`.
    pub(crate) async fn assert_at(&self, number: i64, client: &Client) {
        let found = read_number(client).await;
        assert_eq!(found, number, "the database ends with another commit of the ledger");
        let found = read(client).await;
        let expected = self.at(number);
        assert!(found == expected, "after commit {number} the ledger holds {found:?} instead of {expected:?}");
    }
}

fn apply(amounts: &mut Amounts, commit: &Commit) {
    for (account, amount) in &commit.changes {
        match amount {
            Some(amount) => amounts.insert(*account, *amount),
            None => amounts.remove(account),
        };
    }
}

/// What a database's ledger holds.
pub(crate) async fn read(client: &Client) -> Amounts {
    let rows = client.query("SELECT account, amount FROM ledger", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// The last commit that a database's ledger holds; 0 if it holds none. Gaps are an error: commits come in order.
pub(crate) async fn read_number(client: &Client) -> i64 {
    let sql = "SELECT coalesce(max(number), 0), count(*) FROM ledger_commits";
    let row = client.query_one(sql, &[]).await.unwrap();
    let (last, count): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(last, count, "the database lacks commits of the ledger before its last");
    last
}
