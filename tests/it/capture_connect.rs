//! Getting in: passwords, TLS, hosts, and being told why not.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use walguard::capture::{CaptureError, Config, ConnInfo, Environment, TargetSessionAttrs, Walsender, connect_sql};

use crate::harness::{Cluster, Proxy, Scratch, finish, majors, wait_for};

/// A connection string without the environment of whoever runs the tests.
pub(crate) fn info(text: &str) -> ConnInfo {
    ConnInfo::parse(text, &Environment::default()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

pub(crate) async fn connect(text: &str) -> Result<Walsender, CaptureError> {
    Walsender::connect(&info(text)).await
}

/// Connects for replication and for SQL, and wants the same of both.
async fn both(text: &str) -> Result<(), CaptureError> {
    let replication = connect(text).await;
    let sql = connect_sql(&info(text)).await;
    if let Ok(client) = &sql {
        client.simple_query("SELECT 1").await.expect("an SQL connection answers");
    }
    match (replication, sql) {
        (Ok(mut walsender), Ok(_)) => walsender.identify_system().await.map(drop),
        (Err(error), Err(_)) => Err(error),
        (replication, sql) => panic!("{text}: replication {:?}, SQL {:?}", replication.map(drop), sql.map(drop)),
    }
}

/// A CA, a server certificate for `localhost`, and a client certificate for the role `certified`, made with openssl.
pub(crate) struct Certificates {
    scratch: Scratch,
}

impl Certificates {
    pub(crate) fn make() -> Self {
        let scratch = Scratch::new();
        let certificates = Self { scratch };
        let ca = ["-x509", "-days", "2", "-subj", "/CN=walguard test CA", "-keyout", "ca.key", "-out", "ca.crt"];
        certificates
            .openssl(&[&["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"], &ca[..]].concat());
        certificates.issue("server", "/CN=not.the.name", "subjectAltName=DNS:localhost");
        certificates.issue("client", "/CN=certified", "basicConstraints=CA:FALSE");
        certificates
    }

    fn issue(&self, name: &str, subject: &str, extension: &str) {
        let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
        let new = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-keyout", &key, "-out", &request];
        self.openssl(&new);
        std::fs::write(self.scratch.join("ext"), extension).unwrap();
        let sign =
            ["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
        self.openssl(&[&sign[..], &["-extfile", "ext", "-out", &certificate]].concat());
        // Owned by the server's user, and readable by nobody else: both sides insist.
        let pem = std::fs::read(self.scratch.join(&key)).unwrap();
        self.scratch.file(&key, pem);
    }

    fn openssl(&self, args: &[&str]) {
        let mut command = Command::new("openssl");
        command.args(args).current_dir(self.scratch.path());
        finish(command).expect(0);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

/// A cluster with a role for each way to authenticate, each with the password `secret`.
async fn cluster_with_roles(certificates: &Certificates) -> Cluster {
    let mut builder = Cluster::builder()
        .conf("ssl", "on")
        .conf("ssl_cert_file", &certificates.text("server.crt"))
        .conf("ssl_key_file", &certificates.text("server.key"))
        .conf("ssl_ca_file", &certificates.text("ca.crt"));
    for line in [
        "hostssl replication,postgres certified 127.0.0.1/32 cert",
        "host replication,postgres certified 127.0.0.1/32 reject",
        "host replication,postgres scram 127.0.0.1/32 scram-sha-256",
        "host replication,postgres hashed 127.0.0.1/32 md5",
        "host replication,postgres plain 127.0.0.1/32 password",
        "hostssl replication,postgres sslonly 127.0.0.1/32 trust",
        "host all,replication sslonly 127.0.0.1/32 reject",
        "hostnossl replication,postgres plainonly 127.0.0.1/32 trust",
        "host all,replication plainonly 127.0.0.1/32 reject",
        "host replication bydatabase 127.0.0.1/32 reject",
        "host all,replication outcast 127.0.0.1/32 reject",
    ] {
        builder = builder.hba(line);
    }
    let cluster = builder.start().await;
    let mut sql = String::from("SET password_encryption = 'scram-sha-256';");
    for role in ["certified", "scram", "plain", "sslonly", "plainonly", "bydatabase", "outcast"] {
        sql += &format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'secret';");
    }
    sql += "CREATE ROLE limited LOGIN; SET password_encryption = 'md5';";
    sql += "CREATE ROLE hashed LOGIN REPLICATION PASSWORD 'secret'";
    cluster.sql(&sql).await;
    cluster
}

#[tokio::test]
async fn every_way_to_prove_a_password_works_with_and_without_tls() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let port = cluster.port();
    for role in ["scram", "hashed", "plain"] {
        for sslmode in ["disable", "require"] {
            let text = format!("host=127.0.0.1 port={port} user={role} password=secret sslmode={sslmode}");
            both(&text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
            let wrong = format!("host=127.0.0.1 port={port} user={role} password=wrong sslmode={sslmode}");
            let error = both(&wrong).await.unwrap_err();
            assert!(matches!(error, CaptureError::Authentication { .. }), "{wrong}: {error:?}");
            assert!(!error.is_transient());
            assert!(error.hint().unwrap().contains("password"), "{wrong}: {:?}", error.hint());
        }
    }
    let error = connect(&format!("host=127.0.0.1 port={port} user=scram")).await.unwrap_err();
    assert!(error.to_string().contains("none was given"), "{error}");

    // Channel binding: SCRAM over TLS can, and nothing else.
    let bound = format!("host=localhost hostaddr=127.0.0.1 port={port} password=secret channel_binding=require");
    both(&format!("{bound} user=scram sslmode=require")).await.unwrap();
    for others in [
        "user=scram sslmode=disable",
        "user=hashed sslmode=require",
        "user=plain sslmode=require",
        "user=sslonly sslmode=require",
    ] {
        let error = both(&format!("{bound} {others}")).await.unwrap_err();
        assert!(matches!(error, CaptureError::Authentication { .. }), "{others}: {error:?}");
    }
    both(&format!("host=127.0.0.1 port={port} user=scram password=secret sslmode=require channel_binding=disable"))
        .await
        .unwrap();
}

#[tokio::test]
async fn sslmode_means_what_libpq_means() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let ca = format!("sslrootcert={}", certificates.text("ca.crt"));
    let other = Certificates::make();
    let other_ca = format!("sslrootcert={}", other.text("ca.crt"));
    let pinned = format!("sslrootcert={}", certificates.text("server.crt"));
    let port = cluster.port();
    let (right, wrong) = ("host=localhost hostaddr=127.0.0.1", "host=127.0.0.1");
    // Role, host, options, and whether it works encrypted, works in plain text, or fails.
    let table = [
        ("sslonly", wrong, "sslmode=require", Some(true)),
        ("sslonly", wrong, "sslmode=disable", None),
        ("sslonly", wrong, "sslmode=allow", Some(true)),
        ("sslonly", wrong, "sslmode=prefer", Some(true)),
        ("sslonly", wrong, "", Some(true)),
        ("plainonly", wrong, "sslmode=prefer", Some(false)),
        ("plainonly", wrong, "sslmode=allow", Some(false)),
        ("plainonly", wrong, "sslmode=require", None),
        ("sslonly", wrong, &format!("sslmode=require {ca}"), Some(true)),
        ("sslonly", wrong, &format!("sslmode=require {other_ca}"), None),
        ("sslonly", wrong, &format!("sslmode=verify-ca {ca}"), Some(true)),
        ("sslonly", wrong, &format!("sslmode=verify-ca {other_ca}"), None),
        ("sslonly", wrong, &format!("sslmode=verify-full {ca}"), None),
        ("sslonly", right, &format!("sslmode=verify-full {ca}"), Some(true)),
        ("sslonly", right, &format!("sslmode=verify-full {other_ca}"), None),
        ("sslonly", right, &format!("sslmode=verify-full {pinned}"), Some(true)),
        ("sslonly", wrong, &format!("sslmode=verify-full {pinned}"), None),
        ("sslonly", right, "sslrootcert=system", None),
        ("sslonly", right, "sslmode=verify-ca", None),
        ("sslonly", right, "sslmode=verify-ca sslrootcert=/nonexistent", None),
    ];
    for (role, host, options, expected) in table {
        let text = format!("{host} port={port} user={role} {options}");
        let encrypted = connect(&text).await.map(|walsender| walsender.is_encrypted());
        match (&encrypted, expected) {
            (Ok(encrypted), Some(expected)) => assert_eq!(*encrypted, expected, "{text}"),
            (Err(CaptureError::Tls { .. } | CaptureError::Authentication { .. }), None) => {}
            _ => panic!("{text}: {encrypted:?}"),
        }
        assert_eq!(connect_sql(&info(&text)).await.is_ok(), encrypted.is_ok(), "{text} by SQL");
        if let Err(error) = encrypted {
            assert!(error.hint().is_some() && !error.is_transient(), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let cluster = Cluster::builder().start().await;
    let error = connect(&format!("{} sslmode=require", cluster.conninfo())).await.unwrap_err();
    assert!(error.to_string().contains("does not offer TLS"), "{error}");
    assert!(error.hint().unwrap().contains("sslmode=disable"));
    both(&cluster.conninfo()).await.unwrap(); // loopback: `prefer`
    both(&cluster.conninfo_socket()).await.unwrap();
}

#[tokio::test]
async fn scram_is_bound_to_certificates_of_every_signature() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let rsa = ["req", "-x509", "-days", "2", "-subj", "/CN=localhost", "-nodes", "-newkey"];
    let pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1"];
    let table: [(&str, &[&str], bool); 8] = [
        ("rsa-sha1", &["rsa:2048", "-sha1"], true),
        ("rsa-sha256", &["rsa:2048", "-sha256"], true),
        ("rsa-sha384", &["rsa:2048", "-sha384"], true),
        ("rsa-sha512", &["rsa:2048", "-sha512"], true),
        ("ecdsa-sha384", &["ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha384"], true),
        ("pss-sha256", &[&["rsa:2048", "-sha256"], &pss[..]].concat(), true),
        ("pss-sha384", &[&["rsa:2048", "-sha384"], &pss[..]].concat(), true),
        ("ed25519", &["ed25519"], false), // has no hash of its own: RFC 5929 defines no binding
    ];
    for (name, kind, can_bind) in table {
        let (key, certificate) = (format!("{name}.key"), format!("{name}.crt"));
        certificates.openssl(&[&rsa[..], kind, &["-keyout", &key, "-out", &certificate]].concat());
        let pem = std::fs::read(certificates.path(&key)).unwrap();
        certificates.scratch.file(&key, pem);
        cluster.set_conf("ssl_cert_file", &certificates.text(&certificate));
        cluster.set_conf("ssl_key_file", &certificates.text(&key));
        cluster.sql("SELECT pg_reload_conf()").await;
        // The certificate itself is the root, so only a session under the new one gets in.
        let text = format!(
            "host=localhost hostaddr=127.0.0.1 port={} user=scram password=secret sslmode=verify-full sslrootcert={}",
            cluster.port(),
            certificates.text(&certificate)
        );
        wait_for(name, Duration::from_secs(20), || async { connect(&text).await.is_ok() }).await;
        let bound = both(&format!("{text} channel_binding=require")).await;
        assert_eq!(bound.is_ok(), can_bind, "{name}: {bound:?}");
    }
}

#[tokio::test]
async fn tls_without_asking_first_works_where_the_server_knows_it() {
    let certificates = Certificates::make();
    for major in majors() {
        let builder = Cluster::builder().major(major).conf("ssl", "on");
        let builder = builder.conf("ssl_cert_file", &certificates.text("server.crt"));
        let cluster = builder.conf("ssl_key_file", &certificates.text("server.key")).start().await;
        let direct = both(&format!("{} sslnegotiation=direct", cluster.conninfo())).await;
        assert_eq!(direct.is_ok(), major >= 17, "{major}: {direct:?}");
        let asked = connect(&format!("{} sslmode=require", cluster.conninfo())).await.unwrap();
        assert!(asked.is_encrypted());
    }
}

#[tokio::test]
async fn a_password_from_a_file_gets_in() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let conninfo = format!("host=127.0.0.1 port={} user=scram dbname=postgres", cluster.port());
    let enter = async |config: Config, variable: Option<(&str, String)>| {
        let variables = variable.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let env = Environment { variables, ..Environment::default() };
        let info = ConnInfo::from_config(&config, &env).unwrap();
        connect_sql(&info).await?;
        Walsender::connect(&info).await
    };
    let plain = || Config { conninfo: conninfo.clone(), ..Config::default() };
    let password = certificates.scratch.file("password", "secret\n");
    enter(Config { password_file: Some(password), ..plain() }, None).await.unwrap();
    let passfile = certificates.scratch.file("pgpass", "*:*:replication:scram:secret\n*:*:postgres:scram:secret\n");
    enter(plain(), Some(("PGPASSFILE", passfile.display().to_string()))).await.unwrap();
    enter(plain(), Some(("PGPASSWORD", "secret".to_owned()))).await.unwrap();
    assert!(enter(plain(), None).await.is_err());
}

#[tokio::test]
async fn a_client_certificate_proves_the_role() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let place = format!("host=127.0.0.1 port={} user=certified sslmode=require", cluster.port());
    let (cert, key) = (certificates.text("client.crt"), certificates.text("client.key"));
    both(&format!("{place} sslcert={cert} sslkey={key}")).await.unwrap();
    assert!(matches!(both(&place).await, Err(CaptureError::Authentication { .. })), "without a certificate");
    // One that the server's CA did not sign ends the session: that is no passing trouble.
    let other = Certificates::make();
    let (wrong, wrong_key) = (other.text("client.crt"), other.text("client.key"));
    let error = both(&format!("{place} sslcert={wrong} sslkey={wrong_key}")).await.unwrap_err();
    assert!(matches!(error, CaptureError::Tls { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("ssl_ca_file"), "{error:?}");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let error = both(&format!("{place} sslcert={cert} sslkey={key}")).await.unwrap_err();
    assert!(error.to_string().contains("chmod 0600"), "{error}");
}

#[tokio::test]
async fn whoever_is_refused_is_told_what_to_do() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let port = cluster.port();
    let refused = async |user: &str| {
        connect(&format!("host=127.0.0.1 port={port} user={user} sslmode=disable")).await.unwrap_err()
    };

    let error = refused("limited").await;
    assert!(matches!(error, CaptureError::NotPermitted(_)), "{error:?}");
    assert!(error.hint().unwrap().contains("REPLICATION"), "{:?}", error.hint());

    let error = refused("outcast").await;
    assert!(matches!(error, CaptureError::Authentication { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("pg_hba.conf"), "{:?}", error.hint());

    let error = refused("nobody_knows_me").await;
    assert!(matches!(error, CaptureError::Authentication { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("CREATE ROLE"), "{:?}", error.hint());

    let error = connect_sql(&info(&format!("{} sslmode=disable", cluster.conninfo())).with_dbname("nowhere")).await;
    let error = error.map(drop).unwrap_err();
    assert!(error.hint().unwrap().contains("dbname"), "{error:?}");
}

#[tokio::test]
async fn a_role_without_a_replication_line_gets_in_by_its_database() {
    let certificates = Certificates::make();
    let cluster = cluster_with_roles(&certificates).await;
    let text = format!("host=127.0.0.1 port={} user=bydatabase", cluster.port());
    let mut walsender = connect(&text).await.unwrap();
    walsender.identify_system().await.unwrap();
    assert_eq!(walsender.show("wal_level").await.unwrap(), "replica");
}

#[tokio::test]
async fn among_several_hosts_the_one_with_the_session_that_is_wanted_is_found() {
    let primary = Cluster::builder().start().await;
    let standby = primary.standby().await;
    let nobody = Proxy::start(1).await.port(); // dropped at once: nobody listens
    let (p, s) = (primary.port(), standby.port());
    let text = |ports: &[u16], attrs: &str| {
        let hosts = vec!["127.0.0.1"; ports.len()].join(",");
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        format!("host={hosts} port={} user=walguard target_session_attrs={attrs}", ports.join(","))
    };
    let table: [(&[u16], &str, u16); 8] = [
        (&[s, p], "read-write", p),
        (&[nobody, s, p], "primary", p),
        (&[p, s], "standby", s),
        (&[p, s], "read-only", s),
        (&[p, s], "prefer-standby", s),
        (&[p, nobody], "prefer-standby", p),
        (&[nobody, s, p], "any", s),
        (&[p, s], "any", p),
    ];
    for (ports, attrs, expected) in table {
        let text = text(ports, attrs);
        let walsender = connect(&text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(walsender.endpoint(), format!("127.0.0.1:{expected}"), "{text}");
        let client = connect_sql(&info(&text)).await.unwrap();
        let port: String = client.query_one("SELECT current_setting('port')", &[]).await.unwrap().get(0);
        assert_eq!(port, expected.to_string(), "{text} by SQL");
    }
    let error = connect(&text(&[s, nobody], "read-write")).await.unwrap_err();
    assert!(matches!(error, CaptureError::NoSuitableHost { .. }) && error.is_transient(), "{error:?}");
    let error = connect(&text(&[nobody, nobody], "any")).await.unwrap_err();
    assert!(matches!(error, CaptureError::Unreachable { .. }) && error.is_transient(), "{error:?}");

    standby.promote().await;
    let wanted = info(&text(&[s], "any")).with_target_session_attrs(TargetSessionAttrs::ReadWrite);
    assert!(Walsender::connect(&wanted).await.is_ok(), "after the promotion");
}

#[tokio::test]
async fn a_server_without_a_free_walsender_is_waited_for() {
    let cluster = Cluster::builder().conf("max_wal_senders", "1").start().await;
    let held = connect(&cluster.conninfo()).await.unwrap();
    let error = connect(&cluster.conninfo()).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(error.hint().unwrap().contains("max_wal_senders"), "{:?}", error.hint());
    drop(held);
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_given_up_after_connect_timeout() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for sslmode in ["disable", "prefer"] {
        let text = format!("host=127.0.0.1 port={port} user=u connect_timeout=1 sslmode={sslmode}");
        let begin = std::time::Instant::now();
        let error = connect(&text).await.unwrap_err();
        assert!(matches!(error, CaptureError::Unreachable { .. }), "{error:?}");
        assert!(begin.elapsed().as_secs_f32() < 5.0, "{:?}", begin.elapsed());
    }
}
