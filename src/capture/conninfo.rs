//! Connection strings: the text that libpq reads -> [`ConnInfo`].
//!
//! (PostgreSQL's documentation, "Connection Strings" and "Parameter Key Words"; `conninfo_parse` and `conninfo_uri_parse`
//! in `interfaces/libpq/fe-connect.c`.) Differences from libpq, all on purpose:
//!
//! - TLS is required for a host that is not local, unless `sslmode` is given.
//! - Without a database, SQL connections go to `postgres`: a replication role seldom has a database of its name.
//! - `sslmode=verify-full` without `sslrootcert` or `~/.postgresql/root.crt` trusts the system's roots.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::CaptureError;
use super::Config;

/// What a connection string may refer to beyond itself. An argument, so that tests and callers decide.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// The process's environment; only variables that begin with `PG` are looked at.
    pub variables: BTreeMap<String, String>,
    /// Where `.pgpass` and `.postgresql/` are looked for.
    pub home: Option<PathBuf>,
    /// The operating system's name of who runs us: the default role.
    pub user: Option<String>,
}

impl Environment {
    /// The environment of this process.
    pub fn from_process() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("PG"))
            .collect();
        let account = std::fs::read_to_string("/etc/passwd")
            .ok()
            .and_then(|passwd| passwd_entry(&passwd, rustix::process::geteuid().as_raw()));
        let (user, home) = account.unzip();
        Self {
            variables,
            home: variable("HOME").map(PathBuf::from).or(home),
            user: user.or_else(|| variable("USER")).or_else(|| variable("LOGNAME")),
        }
    }
}

/// Name and home of the account with this number.
fn passwd_entry(passwd: &str, uid: u32) -> Option<(String, PathBuf)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number: u32 = fields.nth(1)?.parse().ok()?;
        let home = fields.nth(2)?;
        (number == uid).then(|| (name.to_owned(), PathBuf::from(home)))
    })
}

/// How far TLS is wanted and trusted. (libpq: `sslmode`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only if the server insists.
    Allow,
    /// If the server offers it.
    Prefer,
    /// Always; the certificate is verified only if a root certificate is named.
    Require,
    /// Always, and a trusted CA signed the certificate.
    VerifyCa,
    /// Always, and the certificate is the host's.
    VerifyFull,
}

impl SslMode {
    /// As libpq spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// Whether SCRAM is bound to the TLS session, which a man in the middle with a stolen certificate cannot relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// Where TLS and the server allow.
    Prefer,
    /// Always: a server that does not bind is refused.
    Require,
}

/// Which of several hosts will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetSessionAttrs {
    /// The first that answers.
    Any,
    /// One that accepts writes.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// One that is not in recovery.
    Primary,
    /// One that is in recovery.
    Standby,
    /// One that is in recovery, or else any.
    PreferStandby,
}

impl TargetSessionAttrs {
    /// As libpq spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::PreferStandby => "prefer-standby",
        }
    }
}

/// Text that no log and no `Debug` shows.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// One place where a server may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The name, or the directory of a Unix socket if it begins with `/`. The certificate is checked against it.
    pub name: String,
    /// The address to go to, if it is not to be looked up. (libpq: `hostaddr`.)
    pub address: Option<IpAddr>,
    /// The port, also part of a Unix socket's file name.
    pub port: u16,
}

impl Host {
    /// The Unix socket's file, if the host is a directory.
    pub fn socket(&self) -> Option<PathBuf> {
        (self.address.is_none() && self.name.starts_with('/'))
            .then(|| Path::new(&self.name).join(format!(".s.PGSQL.{}", self.port)))
    }

    /// True if nothing between us and the server leaves the machine: a Unix socket or a loopback address.
    pub fn is_local(&self) -> bool {
        match self.address {
            Some(address) => address.is_loopback(),
            None => {
                self.socket().is_some()
                    || self.name.eq_ignore_ascii_case("localhost")
                    || self.name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket() {
            Some(socket) => write!(f, "{}", socket.display()),
            None if self.name.contains(':') => write!(f, "[{}]:{}", self.name, self.port),
            None => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

/// The certificates that vouch for a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RootCert {
    /// The operating system's.
    System,
    /// A PEM file that was named.
    File(PathBuf),
    /// A PEM file that counts if it exists.
    Default(PathBuf),
}

/// A PEM file, and whether it must exist because it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PemFile {
    pub(super) path: PathBuf,
    pub(super) named: bool,
}

/// TLS as the connection string asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TlsOptions {
    /// `None` if it was not given: then it depends on the host.
    pub(super) mode: Option<SslMode>,
    /// TLS from the first byte, without asking first (17+).
    pub(super) direct: bool,
    pub(super) root: Option<RootCert>,
    pub(super) cert: Option<PemFile>,
    pub(super) key: Option<PemFile>,
    pub(super) sni: bool,
    pub(super) channel_binding: ChannelBinding,
}

/// How TCP connections find out that the other side is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalives {
    pub(super) enabled: bool,
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    pub(super) user_timeout: Option<Duration>,
}

impl Default for Keepalives {
    /// A dead peer is found within a minute; the system's default is two hours.
    fn default() -> Self {
        Self {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: None,
        }
    }
}

/// Where a cluster is and how to get in: a connection string, read. Passwords do not show in `Debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnInfo {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) password: Option<Secret>,
    pub(super) password_file: Option<PathBuf>,
    pub(super) passfile: Option<PathBuf>,
    pub(super) tls: TlsOptions,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) receive_timeout: Duration,
    pub(super) application_name: String,
    pub(super) options: Option<String>,
    pub(super) target_session_attrs: TargetSessionAttrs,
    pub(super) shuffle_hosts: bool,
    pub(super) keepalives: Keepalives,
}

/// Keys that we read, with the environment variable that stands in for each.
const KEYS: &[(&str, Option<&str>)] = &[
    ("host", Some("PGHOST")),
    ("hostaddr", Some("PGHOSTADDR")),
    ("port", Some("PGPORT")),
    ("dbname", Some("PGDATABASE")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("passfile", Some("PGPASSFILE")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("options", Some("PGOPTIONS")),
    ("application_name", Some("PGAPPNAME")),
    ("fallback_application_name", None),
    ("keepalives", None),
    ("keepalives_idle", None),
    ("keepalives_interval", None),
    ("keepalives_count", None),
    ("tcp_user_timeout", None),
    ("sslmode", Some("PGSSLMODE")),
    ("sslnegotiation", Some("PGSSLNEGOTIATION")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslkey", Some("PGSSLKEY")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslsni", Some("PGSSLSNI")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("load_balance_hosts", Some("PGLOADBALANCEHOSTS")),
];

/// Keys that libpq knows and that say nothing to us: `replication` is always ours to set, the encoding always UTF-8,
/// compression of TLS is gone from TLS, and GSS encryption is never tried.
const KEYS_IGNORED: &[&str] = &["replication", "client_encoding", "sslcompression", "gssencmode"];

/// The port of PostgreSQL.
const PORT: u16 = 5432;

type Pairs = BTreeMap<String, String>;

impl ConnInfo {
    /// Reads a connection string: `postgresql://...` or `key=value ...`. What it leaves out comes from the environment's
    /// `PG*` variables, then from defaults. Files that it names are not read before a connection is made.
    ///
    /// # Errors
    /// [`CaptureError::Conninfo`] naming the key that is unknown, missing or has a value that cannot be.
    pub fn parse(text: &str, env: &Environment) -> Result<Self, CaptureError> {
        Self::from_config(&Config { conninfo: text.to_owned(), ..Config::default() }, env)
    }

    /// Reads the connection string of `config`, with the settings beside it as defaults.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn from_config(config: &Config, env: &Environment) -> Result<Self, CaptureError> {
        let text = config.conninfo.trim();
        let mut given = match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
            Some(rest) => parse_url(rest)?,
            None => parse_pairs(text)?,
        };
        for key in given.keys() {
            if !KEYS.iter().any(|(known, _)| known == key) && !KEYS_IGNORED.contains(&key.as_str()) {
                return Err(unknown_key(key));
            }
        }
        // The settings' name goes before PGAPPNAME: the environment is the weakest word.
        let application_name = config.application_name.clone();
        given.entry("application_name".to_owned()).or_insert(application_name);
        for (key, variable) in KEYS {
            let value = variable.and_then(|name| env.variables.get(name)).filter(|value| !value.is_empty());
            if let Some(value) = value {
                given.entry((*key).to_owned()).or_insert_with(|| value.clone());
            }
        }
        given.retain(|_, value| !value.is_empty());
        Self::build(&given, config, env)
    }

    fn build(given: &Pairs, config: &Config, env: &Environment) -> Result<Self, CaptureError> {
        let get = |key: &str| given.get(key).map(String::as_str);
        let dot_postgresql = |name: &str| env.home.as_ref().map(|home| home.join(".postgresql").join(name));
        let user = get("user").map(str::to_owned).or_else(|| env.user.clone());
        let pem = |key: &str, name: &str| match get(key) {
            Some(path) => Some(PemFile { path: path.into(), named: true }),
            None => dot_postgresql(name).map(|path| PemFile { path, named: false }),
        };
        let root = match get("sslrootcert") {
            Some("system") => Some(RootCert::System),
            Some(path) => Some(RootCert::File(path.into())),
            None => dot_postgresql("root.crt").map(RootCert::Default),
        };
        let mode = get("sslmode").map(ssl_mode).transpose()?;
        let mode = match (mode, &root) {
            // Anybody can have a certificate from a public CA: only the host name makes it proof. (libpq does the same.)
            (None, Some(RootCert::System)) => Some(SslMode::VerifyFull),
            (Some(mode), Some(RootCert::System)) if mode != SslMode::VerifyFull => {
                return Err(CaptureError::conninfo(format!(
                    "sslrootcert=system proves something only with sslmode=verify-full, not with sslmode={}",
                    mode.as_str()
                )));
            }
            (mode, _) => mode,
        };
        let direct = match get("sslnegotiation") {
            None | Some("postgres") => false,
            Some("direct") if mode.is_none_or(|mode| mode >= SslMode::Require) => true,
            Some("direct") => {
                return Err(CaptureError::conninfo("sslnegotiation=direct needs sslmode=require or stronger"));
            }
            Some(other) => return Err(bad_value("sslnegotiation", other, "postgres or direct")),
        };
        let tls = TlsOptions {
            mode: if direct { mode.or(Some(SslMode::Require)) } else { mode },
            direct,
            root,
            cert: pem("sslcert", "postgresql.crt"),
            key: pem("sslkey", "postgresql.key"),
            sni: boolean(given, "sslsni")?.unwrap_or(true),
            channel_binding: match get("channel_binding") {
                None | Some("prefer") => ChannelBinding::Prefer,
                Some("disable") => ChannelBinding::Disable,
                Some("require") => ChannelBinding::Require,
                Some(other) => return Err(bad_value("channel_binding", other, "disable, prefer or require")),
            },
        };
        Ok(Self {
            hosts: hosts(given)?,
            user: user.ok_or_else(|| CaptureError::conninfo("no role: say user=... or set PGUSER"))?,
            dbname: get("dbname").unwrap_or("postgres").to_owned(),
            password: get("password").map(|password| Secret(password.to_owned())),
            password_file: config.password_file.clone(),
            passfile: get("passfile").map(PathBuf::from).or_else(|| env.home.as_ref().map(|home| home.join(".pgpass"))),
            tls,
            connect_timeout: match seconds(given, "connect_timeout")? {
                Some(timeout) if timeout.is_zero() => None, // libpq: 0 is for ever
                Some(timeout) => Some(timeout),
                None => Some(config.connect_timeout),
            },
            receive_timeout: config.receive_timeout,
            application_name: get("application_name")
                .or_else(|| get("fallback_application_name"))
                .unwrap_or("walguard")
                .to_owned(),
            options: get("options").map(str::to_owned),
            target_session_attrs: target_session_attrs(get("target_session_attrs").unwrap_or("any"))?,
            shuffle_hosts: match get("load_balance_hosts") {
                None | Some("disable") => false,
                Some("random") => true,
                Some(other) => return Err(bad_value("load_balance_hosts", other, "disable or random")),
            },
            keepalives: keepalives(given)?,
        })
    }

    /// The hosts, in the order in which they are tried.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The role.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database that SQL connections go to.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// The name that the server shows in `pg_stat_activity` and `pg_stat_replication`.
    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    /// Which of several hosts will do.
    pub fn target_session_attrs(&self) -> TargetSessionAttrs {
        self.target_session_attrs
    }

    /// The same place under another application name.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.application_name);
        self
    }

    /// The same place, with a setting of the server for these sessions. It stands behind those of the connection string,
    /// so it wins.
    #[must_use]
    pub fn with_setting(mut self, name: &str, value: &str) -> Self {
        let before = self.options.take().filter(|options| !options.is_empty());
        let before = before.map(|options| options + " ").unwrap_or_default();
        self.options = Some(format!("{before}-c {name}={value}"));
        self
    }

    /// The same place, with SQL in another database.
    #[must_use]
    pub fn with_dbname(mut self, dbname: &str) -> Self {
        dbname.clone_into(&mut self.dbname);
        self
    }

    /// The same place, but only a session of this kind will do.
    #[must_use]
    pub fn with_target_session_attrs(mut self, wanted: TargetSessionAttrs) -> Self {
        self.target_session_attrs = wanted;
        self
    }

    /// How far TLS is wanted with `host`: as given, or `require` for a host that is not local.
    pub fn ssl_mode(&self, host: &Host) -> SslMode {
        if host.socket().is_some() {
            return SslMode::Disable; // libpq: sslmode says nothing about Unix sockets
        }
        self.tls.mode.unwrap_or(if host.is_local() { SslMode::Prefer } else { SslMode::Require })
    }

    /// What libpq's programs take the same place and credentials from: `PG*` variables. They hold the password.
    ///
    /// # Errors
    /// If the password file cannot be read.
    pub fn child_environment(&self) -> Result<Vec<(&'static str, String)>, CaptureError> {
        let list = |text: &dyn Fn(&Host) -> String| self.hosts.iter().map(text).collect::<Vec<_>>().join(",");
        let mut variables = vec![
            ("PGHOST", list(&|host| host.name.clone())),
            ("PGPORT", list(&|host| host.port.to_string())),
            ("PGUSER", self.user.clone()),
            ("PGDATABASE", self.dbname.clone()),
            ("PGAPPNAME", self.application_name.clone()),
            ("PGTARGETSESSIONATTRS", self.target_session_attrs.as_str().to_owned()),
            ("PGOPTIONS", self.options.clone().unwrap_or_default()),
        ];
        if self.hosts.iter().any(|host| host.address.is_some()) {
            let address = |host: &Host| host.address.map(|address| address.to_string()).unwrap_or_default();
            variables.push(("PGHOSTADDR", list(&address)));
        }
        let mode = self.hosts.first().map(|host| self.ssl_mode(host));
        variables.extend(mode.map(|mode| ("PGSSLMODE", mode.as_str().to_owned())));
        if let Some(RootCert::File(path) | RootCert::Default(path)) = &self.tls.root {
            variables.push(("PGSSLROOTCERT", path.display().to_string()));
        }
        let pems = [("PGSSLCERT", &self.tls.cert), ("PGSSLKEY", &self.tls.key)];
        variables.extend(pems.iter().filter_map(|(name, pem)| Some((*name, pem.as_ref()?.path.display().to_string()))));
        let limit = self.connect_timeout.map(|limit| limit.as_secs().max(2).to_string());
        variables.extend(limit.map(|limit| ("PGCONNECT_TIMEOUT", limit)));
        let host = self.hosts.first();
        let password = host.map(|host| self.password_for(host, &self.dbname)).transpose()?.flatten();
        variables.extend(password.map(|password| ("PGPASSWORD", password.reveal().to_owned())));
        Ok(variables)
    }

    /// True if the connection string (or `PGPASSWORD`) holds a password, so that it must not be written down.
    pub fn has_password(&self) -> bool {
        self.password.is_some()
    }

    /// The password for `host`: from the settings' file, the connection string or `PGPASSWORD`, or the password file.
    /// Files are read now, because passwords rotate. `database` is `replication` on a replication connection, as
    /// `pg_receivewal` looks it up.
    pub(super) fn password_for(&self, host: &Host, database: &str) -> Result<Option<Secret>, CaptureError> {
        if let Some(path) = &self.password_file {
            let text = std::fs::read_to_string(path)
                .map_err(|error| CaptureError::conninfo(format!("read password_file {}: {error}", path.display())))?;
            return Ok(Some(Secret(text.lines().next().unwrap_or_default().to_owned())));
        }
        if self.password.is_some() {
            return Ok(self.password.clone());
        }
        let Some(path) = &self.passfile else { return Ok(None) };
        let Some(text) = read_passfile(path) else { return Ok(None) };
        // libpq: a Unix socket in a default directory is looked up as localhost.
        let name = match host.socket() {
            Some(_) if DEFAULT_SOCKET_DIRECTORIES.contains(&host.name.as_str()) => "localhost",
            _ => host.name.as_str(),
        };
        let port = host.port.to_string();
        Ok(passfile_entry(&text, [name, &port, database, &self.user]).map(Secret))
    }
}

impl fmt::Display for ConnInfo {
    /// Who and where, without secrets: `walguard@db1:5432,db2:5432`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.user)?;
        for (index, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// Where distributions (first) and PostgreSQL itself (second) put the socket: tried when no host is named.
const DEFAULT_SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// The text of a connection string without what may be a password: all of it but a URL's end, if there is a doubt.
pub(super) fn redact(text: &str) -> String {
    if text.to_ascii_lowercase().contains("password") {
        return "[redacted]".to_owned();
    }
    match text.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((credentials, place)) if credentials.contains(':') => format!("{scheme}://[redacted]@{place}"),
            _ => text.to_owned(),
        },
        None => text.to_owned(),
    }
}

fn unknown_key(key: &str) -> CaptureError {
    let known: Vec<&str> = KEYS.iter().map(|(known, _)| *known).collect();
    CaptureError::conninfo(format!("`{key}` is not a connection option of walguard; it knows {}", known.join(", ")))
}

fn bad_value(key: &str, value: &str, expected: &str) -> CaptureError {
    CaptureError::conninfo(format!("{key}={value}: expected {expected}"))
}

fn ssl_mode(text: &str) -> Result<SslMode, CaptureError> {
    use SslMode::{Allow, Disable, Prefer, Require, VerifyCa, VerifyFull};
    [Disable, Allow, Prefer, Require, VerifyCa, VerifyFull]
        .into_iter()
        .find(|mode| mode.as_str() == text)
        .ok_or_else(|| bad_value("sslmode", text, "disable, allow, prefer, require, verify-ca or verify-full"))
}

fn target_session_attrs(text: &str) -> Result<TargetSessionAttrs, CaptureError> {
    use TargetSessionAttrs::{Any, PreferStandby, Primary, ReadOnly, ReadWrite, Standby};
    [Any, ReadWrite, ReadOnly, Primary, Standby, PreferStandby].into_iter().find(|a| a.as_str() == text).ok_or_else(
        || bad_value("target_session_attrs", text, "any, read-write, read-only, primary, standby or prefer-standby"),
    )
}

fn number(given: &Pairs, key: &str) -> Result<Option<u64>, CaptureError> {
    given.get(key).map(|text| text.trim().parse().map_err(|_| bad_value(key, text, "a number"))).transpose()
}

fn seconds(given: &Pairs, key: &str) -> Result<Option<Duration>, CaptureError> {
    Ok(number(given, key)?.map(Duration::from_secs))
}

fn boolean(given: &Pairs, key: &str) -> Result<Option<bool>, CaptureError> {
    match given.get(key).map(String::as_str) {
        None => Ok(None),
        Some("0") => Ok(Some(false)),
        Some("1") => Ok(Some(true)),
        Some(other) => Err(bad_value(key, other, "0 or 1")),
    }
}

fn keepalives(given: &Pairs) -> Result<Keepalives, CaptureError> {
    let default = Keepalives::default();
    // 0 is the system's default for libpq; ours finds a dead peer sooner, so 0 keeps it.
    let positive = |value: Option<Duration>, or: Duration| value.filter(|v| !v.is_zero()).unwrap_or(or);
    let count = number(given, "keepalives_count")?.filter(|&n| n > 0);
    Ok(Keepalives {
        enabled: boolean(given, "keepalives")?.unwrap_or(true),
        idle: positive(seconds(given, "keepalives_idle")?, default.idle),
        interval: positive(seconds(given, "keepalives_interval")?, default.interval),
        count: match count {
            Some(n) => u32::try_from(n).map_err(|_| bad_value("keepalives_count", &n.to_string(), "a small number"))?,
            None => default.count,
        },
        user_timeout: number(given, "tcp_user_timeout")?.filter(|&n| n > 0).map(Duration::from_millis),
    })
}

/// Puts together the lists `host`, `hostaddr` and `port`.
fn hosts(given: &Pairs) -> Result<Vec<Host>, CaptureError> {
    let list = |key: &str| -> Vec<&str> { given.get(key).map_or(Vec::new(), |text| text.split(',').collect()) };
    let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        let counts = format!("{} hosts but {} host addresses", names.len(), addresses.len());
        return Err(CaptureError::conninfo(format!("host, hostaddr: {counts}")));
    }
    let count = names.len().max(addresses.len()).max(1);
    if ports.len() > 1 && ports.len() != count {
        return Err(CaptureError::conninfo(format!("port: {} ports for {count} hosts", ports.len())));
    }
    let mut hosts = Vec::new();
    for index in 0..count {
        let port = match ports.get(index).or(ports.first().filter(|_| ports.len() == 1)).map(|text| text.trim()) {
            None | Some("") => PORT,
            Some(text) => match text.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(bad_value("port", text, "a number from 1 to 65535")),
            },
        };
        let address = match addresses.get(index).map(|text| text.trim()) {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| bad_value("hostaddr", text, "an IP address"))?),
        };
        match (names.get(index).map(|name| name.trim()).filter(|name| !name.is_empty()), address) {
            (Some(name), _) if name.starts_with('@') => {
                return Err(bad_value(
                    "host",
                    name,
                    "a name, an address or a directory (abstract sockets are not supported)",
                ));
            }
            (Some(name), address) => hosts.push(Host { name: name.to_owned(), address, port }),
            (None, Some(ip)) => hosts.push(Host { name: ip.to_string(), address: Some(ip), port }),
            (None, None) => hosts.extend(DEFAULT_SOCKET_DIRECTORIES.map(|directory| Host {
                name: directory.to_owned(),
                address: None,
                port,
            })),
        }
    }
    Ok(hosts)
}

/// `key = value key='quoted \' value'`.
fn parse_pairs(text: &str) -> Result<Pairs, CaptureError> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        // A text without `=` is not shown: it may be a password that slipped out of its quotes.
        let missing = || CaptureError::conninfo("expected key=value pairs or a postgresql:// URL; a `=` is missing");
        let (key, tail) = rest.split_once('=').ok_or_else(missing)?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(missing());
        }
        let (value, tail) = take_value(tail.trim_start())
            .ok_or_else(|| CaptureError::conninfo(format!("the quoted value of `{key}` does not end")))?;
        pairs.insert(key.to_owned(), value);
        rest = tail.trim_start();
    }
    Ok(pairs)
}

/// One value, quoted or not, and what follows it; `None` if the closing quote is missing.
fn take_value(text: &str) -> Option<(String, &str)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices();
    if quoted {
        chars.next();
    }
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            '\'' if quoted => return Some((value, text.get(at + 1..).unwrap_or_default())),
            c if !quoted && c.is_whitespace() => return Some((value, text.get(at..).unwrap_or_default())),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

/// `[user[:password]@][host[:port],...][/dbname][?key=value&...]`, after the scheme.
fn parse_url(rest: &str) -> Result<Pairs, CaptureError> {
    let mut pairs = Pairs::new();
    let mut put = |key: &str, value: String| {
        if !value.is_empty() {
            pairs.insert(key.to_owned(), value);
        }
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, dbname) = rest.split_once('/').unwrap_or((rest, ""));
    put("dbname", percent_decode("dbname", dbname)?);
    let hosts = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            put("user", percent_decode("user", user)?);
            put("password", percent_decode("password", password)?);
            hosts
        }
        None => authority,
    };
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = if let Some(bracketed) = host.strip_prefix('[') {
            let (name, port) = bracketed
                .split_once(']')
                .ok_or_else(|| CaptureError::conninfo(format!("host `{host}`: a `]` is missing")))?;
            match port.strip_prefix(':') {
                Some(port) => (name, port),
                None if port.is_empty() => (name, ""),
                None => return Err(CaptureError::conninfo(format!("host `{host}`: expected `:` after `]`"))),
            }
        } else {
            host.split_once(':').unwrap_or((host, ""))
        };
        names.push(percent_decode("host", name)?);
        ports.push(percent_decode("port", port)?);
    }
    if names.iter().any(|name| !name.is_empty()) || names.len() > 1 {
        put("host", names.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        put("port", ports.join(","));
    }
    for parameter in query.into_iter().flat_map(|query| query.split('&')).filter(|p| !p.is_empty()) {
        let (key, value) = parameter
            .split_once('=')
            .ok_or_else(|| CaptureError::conninfo(format!("`{parameter}` in the URL: a `=` is missing")))?;
        let (key, value) = (percent_decode("key", key)?, percent_decode(key, value)?);
        match (key.as_str(), value.as_str()) {
            ("ssl", "true") => put("sslmode", "require".to_owned()), // as libpq, for JDBC's URLs
            _ => put(&key, value),
        }
    }
    Ok(pairs)
}

/// The error does not show the value: it may be a password.
fn percent_decode(key: &str, text: &str) -> Result<String, CaptureError> {
    let fault = |what: &str| CaptureError::conninfo(format!("`{key}` in the URL: {what}"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut input = text.bytes();
    while let Some(byte) = input.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || input.next().and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(fault("`%` must be followed by two hexadecimal digits (a plain percent sign is %25)"));
        };
        match u8::try_from(high * 16 + low) {
            Ok(0) | Err(_) => return Err(fault("%00 is not allowed")),
            Ok(byte) => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).map_err(|_| fault("not UTF-8"))
}

/// The password file, if it is there and nobody else can read it. (libpq: `passwordFromFile`.) One that cannot be used is
/// told of once, and not with each connection; one that cannot even be looked at, as root's home under `sudo`, is nobody's.
fn read_passfile(path: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    static TOLD: std::sync::Once = std::sync::Once::new();
    let ignored = |problem: &dyn fmt::Display| {
        TOLD.call_once(|| tracing::warn!("ignored password file {}: {problem}", path.display()));
        None
    };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => return None,
        Err(error) => return ignored(&error),
    };
    if !metadata.is_file() {
        return ignored(&"not a plain file");
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return ignored(&"group or others may read it; chmod 0600 it");
    }
    std::fs::read_to_string(path).map_or_else(|error| ignored(&error), Some)
}

/// The password of the first line `host:port:database:user:password` that matches; `*` matches anything, `\` escapes.
fn passfile_entry(text: &str, wanted: [&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = split_escaped(line);
        for want in wanted {
            let (field, escaped) = fields.next()?;
            let any = field == "*" && !escaped;
            if !any && field != want {
                return None;
            }
        }
        // The rest is the password; colons in it may be escaped or, after the last field, plain.
        let rest: Vec<String> = fields.map(|(field, _)| field).collect();
        (!rest.is_empty()).then(|| rest.join(":"))
    })
}

/// The fields of a line between unescaped colons, each with whether anything in it was escaped.
fn split_escaped(line: &str) -> impl Iterator<Item = (String, bool)> {
    let mut chars = line.chars();
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let (mut field, mut escaped) = (String::new(), false);
        loop {
            match chars.next() {
                None => {
                    done = true;
                    break;
                }
                Some(':') => break,
                Some('\\') => {
                    escaped = true;
                    field.extend(chars.next());
                }
                Some(c) => field.push(c),
            }
        }
        Some((field, escaped))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn env() -> Environment {
        Environment { variables: BTreeMap::new(), home: None, user: Some("os".to_owned()) }
    }

    fn parse(text: &str) -> ConnInfo {
        ConnInfo::parse(text, &env()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn problem(text: &str) -> String {
        ConnInfo::parse(text, &env()).map_or_else(|error| error.to_string(), |info| panic!("{text}: {info:?}"))
    }

    fn places(info: &ConnInfo) -> Vec<String> {
        info.hosts().iter().map(Host::to_string).collect()
    }

    #[test]
    fn urls_and_pairs_say_the_same() {
        let table = [
            (
                "postgresql://u:p@db1:5433/app?connect_timeout=3",
                "host=db1 port=5433 user=u password=p dbname=app connect_timeout=3",
            ),
            ("postgres://u@db1,db2:7000/", "user=u host=db1,db2 port=,7000"),
            ("postgresql://u:p%40%3A%2F%25@db1", "host=db1 user=u password='p@:/%'"),
            ("postgresql://%2Frun%2Fpg:6000/x", "host=/run/pg port=6000 dbname=x"),
            ("postgresql:///x?host=/run/pg&port=6000", "host = /run/pg  port = 6000 dbname = 'x'"),
            ("postgresql://u@[2001:db8::1]:1234", "host=2001:db8::1 port=1234 user=u"),
            ("postgresql://db1?ssl=true", "host=db1 sslmode=require"),
            ("postgresql://", ""),
            ("postgresql://db1/?options=-c%20wal_sender_timeout%3D60s", "host=db1 options='-c wal_sender_timeout=60s'"),
            ("postgresql://db1?application_name=it%27s%5C", r"host=db1 application_name='it\'s\\'"),
        ];
        for (url, pairs) in table {
            assert_eq!(parse(url), parse(pairs), "{url}");
        }
    }

    #[test]
    fn lists_of_hosts_are_put_together_as_libpq_does() {
        assert_eq!(places(&parse("host=a,b,c port=1,2,3")), ["a:1", "b:2", "c:3"]);
        assert_eq!(places(&parse("host=a,b port=7")), ["a:7", "b:7"]);
        assert_eq!(places(&parse("host=a,b port=,7")), ["a:5432", "b:7"]);
        assert_eq!(places(&parse("hostaddr=10.0.0.1,10.0.0.2")), ["10.0.0.1:5432", "10.0.0.2:5432"]);
        assert_eq!(places(&parse("")), ["/var/run/postgresql/.s.PGSQL.5432", "/tmp/.s.PGSQL.5432"]);
        assert!(problem("host=a,b,c port=1,2").contains("2 ports for 3 hosts"));
        assert!(problem("host=a,b hostaddr=::1").contains("2 hosts but 1"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let table = [
            ("host=a sslmod=require", "`sslmod`"),
            ("host=a service=x", "`service`"),
            ("host=a sslmode=yes", "sslmode=yes"),
            ("host=a port=0", "port=0"),
            ("host=a port=70000", "port=70000"),
            ("host=a hostaddr=nowhere", "hostaddr=nowhere"),
            ("host=a connect_timeout=soon", "connect_timeout=soon"),
            ("host=a channel_binding=maybe", "channel_binding=maybe"),
            ("host=a target_session_attrs=rw", "target_session_attrs=rw"),
            ("host=a keepalives=yes", "keepalives=yes"),
            ("host=a sslrootcert=system sslmode=require", "sslmode=verify-full"),
            ("host=a sslnegotiation=direct sslmode=prefer", "sslnegotiation=direct"),
            ("host='a", "`host`"),
            ("host", "`=`"),
            ("postgresql://a?x", "`x`"),
            ("postgresql://[::1", "`]`"),
            ("postgresql://u:%zz@a", "`password`"),
            ("postgresql://u:%00@a", "%00"),
            ("postgresql://a?nosuch=1", "`nosuch`"),
        ];
        for (text, part) in table {
            assert!(problem(text).contains(part), "{text}: {}", problem(text));
        }
    }

    #[test]
    fn no_error_and_no_debug_shows_a_password() {
        let info = parse("host=a user=u password=tops3cret");
        assert!(!format!("{info:?} {info}").contains("tops3cret"));
        for text in ["host=a user=u password=tops3cret", "postgresql://u:tops3cret@a/d", "postgresql://u:tops3cret@x@a"]
        {
            let config = Config { conninfo: text.to_owned(), ..Config::default() };
            assert!(!format!("{config:?}").contains("s3cret"), "{config:?}");
        }
        for text in ["postgresql://u:tops3cret%zz@a", "host=a password='tops3cret", "host=a password=x tops3cret"] {
            assert!(!problem(text).contains("tops3cret"), "{}", problem(text));
        }
    }

    #[test]
    fn the_environment_fills_what_the_text_leaves_out() {
        let variables = [
            ("PGHOST", "envhost"),
            ("PGPORT", "9"),
            ("PGUSER", "envuser"),
            ("PGPASSWORD", "envpass"),
            ("PGSSLMODE", "disable"),
            ("PGAPPNAME", "envapp"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let env = Environment { variables, home: None, user: None };
        let info = ConnInfo::parse("port=7", &env).unwrap();
        assert_eq!(info.to_string(), "envuser@envhost:7");
        assert_eq!(info.ssl_mode(&info.hosts()[0]), SslMode::Disable);
        assert_eq!(info.password.as_ref().map(Secret::reveal), Some("envpass"));
        assert_eq!(info.application_name(), "walguard", "the settings' name is nearer than the environment's");
        assert!(ConnInfo::parse("host=a", &Environment::default()).is_err(), "there is no role to guess");
    }

    #[test]
    fn a_host_that_is_not_local_needs_tls_unless_sslmode_is_given() {
        let mode = |text: &str| {
            let info = parse(text);
            info.ssl_mode(&info.hosts()[0])
        };
        assert_eq!(mode("host=db1"), SslMode::Require);
        assert_eq!(mode("host=10.0.0.1"), SslMode::Require);
        assert_eq!(mode("host=localhost hostaddr=10.0.0.1"), SslMode::Require);
        assert_eq!(mode("host=localhost"), SslMode::Prefer);
        assert_eq!(mode("host=127.0.0.9"), SslMode::Prefer);
        assert_eq!(mode("host=::1"), SslMode::Prefer);
        assert_eq!(mode("host=/run/postgresql sslmode=verify-full"), SslMode::Disable);
        assert_eq!(mode("host=db1 sslmode=prefer"), SslMode::Prefer);
        assert_eq!(mode("host=db1 sslrootcert=system"), SslMode::VerifyFull);
        assert_eq!(mode("host=db1 sslnegotiation=direct"), SslMode::Require);
    }

    #[test]
    fn a_password_file_is_read_line_by_line_with_stars_and_escapes() {
        let text =
            "# db:1:d:u:no\ndb:1:d:u:one\n*:*:replication:u:two\nd\\:b:*:*:\\*:th\\:r\\\\ee\nshort:line\n*:*:*:z:";
        let entry = |wanted| passfile_entry(text, wanted);
        assert_eq!(entry(["db", "1", "d", "u"]).as_deref(), Some("one"));
        assert_eq!(entry(["db", "2", "replication", "u"]).as_deref(), Some("two"));
        assert_eq!(entry(["d:b", "2", "x", "*"]).as_deref(), Some("th:r\\ee"));
        assert_eq!(entry(["d:b", "2", "x", "u"]), None, "an escaped star is a star");
        assert_eq!(entry(["short", "line", "x", "u"]), None);
    }

    #[test]
    fn a_password_file_that_others_can_read_is_ignored() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(".pgpass");
        std::fs::write(&path, "*:*:*:*:fromfile\n").unwrap();
        let env = Environment { variables: BTreeMap::new(), home: Some(home.path().to_owned()), user: None };
        let info = ConnInfo::parse("host=a user=u", &env).unwrap();
        let found = || info.password_for(&info.hosts()[0], "replication").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(found(), None);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(found().as_ref().map(Secret::reveal), Some("fromfile"));
        let given = ConnInfo::parse("host=a user=u password=given", &env).unwrap();
        assert_eq!(given.password_for(&given.hosts()[0], "x").unwrap().as_ref().map(Secret::reveal), Some("given"));
    }

    #[test]
    fn the_settings_password_file_is_read_anew_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let config =
            Config { conninfo: "host=a user=u".to_owned(), password_file: Some(path.clone()), ..Config::default() };
        let info = ConnInfo::from_config(&config, &env()).unwrap();
        for password in ["first", "rotated"] {
            std::fs::write(&path, format!("{password}\n")).unwrap();
            let found = info.password_for(&info.hosts()[0], "x").unwrap();
            assert_eq!(found.as_ref().map(Secret::reveal), Some(password));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(info.password_for(&info.hosts()[0], "x").is_err(), "a file that was named must be there");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics_the_parser(text in ".{0,80}", url in "postgres://[a%@:/?&=,\\[\\]0-9]{0,40}") {
            let _ = ConnInfo::parse(&text, &env());
            let _ = ConnInfo::parse(&url, &env());
        }
    }

    #[test]
    fn a_value_with_any_character_survives_quoting() {
        for value in ["a b", "it's", r"back\slash", "=", "é"] {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            assert_eq!(parse(&format!("host=a application_name='{quoted}'")).application_name(), value);
        }
    }
}
