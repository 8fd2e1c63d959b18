//! E-mail, to a small SMTP server with TLS: encrypted or not at all, to everybody who can get it, once.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufStream};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use walguard::notify::{Channel, Event, Message, SendError, Sending};

use crate::capture_connect::Certificates;
use crate::harness::Scratch;
use crate::notify::{open, setting, wipe};

const HUSH: &str = "hush-hush-hush-0123456789abcdef";

/// How the server encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    Starttls,
    Implicit,
    /// It does not offer STARTTLS, as if somebody in between took it out.
    Stripped,
}

#[derive(Debug, Default)]
struct Shared {
    letters: Vec<(String, String)>,
    /// Answers to RCPT TO, by address.
    refused: BTreeMap<String, &'static str>,
    logins: Vec<String>,
    hang_at_data: bool,
    commands: Vec<String>,
}

struct Server {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

impl Server {
    async fn start(certificates: &Certificates, tls: Tls) -> Self {
        let chain = CertificateDer::pem_slice_iter(&fs::read(certificates.path("server.crt")).unwrap())
            .collect::<Result<Vec<_>, _>>()
            .unwrap();
        let key = PrivateKeyDer::from_pem_slice(&fs::read(certificates.path("server.key")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let told = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, shared) = (acceptor.clone(), Arc::clone(&told));
                tokio::spawn(async move {
                    if tls == Tls::Implicit {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        talk(BufStream::new(stream), true, false, &shared, true).await;
                        return;
                    }
                    let mut stream = BufStream::new(stream);
                    let offers = tls == Tls::Starttls;
                    if !talk_until_tls(&mut stream, offers, &shared).await {
                        return;
                    }
                    let Ok(stream) = acceptor.accept(stream.into_inner()).await else { return };
                    talk(BufStream::new(stream), true, false, &shared, false).await;
                });
            }
        });
        Self { address, shared }
    }

    fn letters(&self) -> Vec<(String, String)> {
        self.shared.lock().unwrap().letters.clone()
    }

    fn refuse(&self, address: &str, answer: Option<&'static str>) {
        let mut shared = self.shared.lock().unwrap();
        match answer {
            Some(answer) => shared.refused.insert(address.to_owned(), answer),
            None => shared.refused.remove(address),
        };
    }
}

/// True if the client asked for TLS.
async fn talk_until_tls<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut BufStream<S>,
    offers: bool,
    shared: &Mutex<Shared>,
) -> bool {
    say(stream, "220 mail ready").await;
    loop {
        let Some(line) = hear(stream).await else { return false };
        shared.lock().unwrap().commands.push(line.clone());
        match line.split(' ').next().unwrap_or_default().to_ascii_uppercase().as_str() {
            "EHLO" if offers => say(stream, "250-mail\r\n250 STARTTLS").await,
            "EHLO" => say(stream, "250-mail\r\n250 AUTH PLAIN").await,
            "STARTTLS" if offers => {
                say(stream, "220 go on").await;
                return true;
            }
            "QUIT" => return false,
            _ => say(stream, "500 what?").await,
        }
    }
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: BufStream<S>,
    auth: bool,
    mut is_in: bool,
    shared: &Mutex<Shared>,
    greet: bool,
) {
    if greet {
        say(&mut stream, "220 mail ready").await;
    }
    let mut to = String::new();
    while let Some(line) = hear(&mut stream).await {
        let verb = line.split([' ', ':']).next().unwrap_or_default().to_ascii_uppercase();
        match verb.as_str() {
            "EHLO" if auth => say(&mut stream, "250-mail\r\n250 AUTH PLAIN LOGIN").await,
            "AUTH" => {
                shared.lock().unwrap().logins.push(line.clone());
                is_in = true;
                say(&mut stream, "235 welcome").await;
            }
            "MAIL" if !is_in => say(&mut stream, "530 who are you?").await,
            "MAIL" => say(&mut stream, "250 ok").await,
            "RCPT" => {
                to = line.split(['<', '>']).nth(1).unwrap_or_default().to_owned();
                let answer = shared.lock().unwrap().refused.get(&to).copied().unwrap_or("250 ok");
                say(&mut stream, answer).await;
            }
            "DATA" => {
                say(&mut stream, "354 go on").await;
                let mut letter = String::new();
                while let Some(line) = hear(&mut stream).await {
                    if line == "." {
                        break;
                    }
                    letter += &format!("{}\n", line.strip_prefix('.').unwrap_or(&line));
                }
                let hang = {
                    let mut shared = shared.lock().unwrap();
                    shared.letters.push((to.clone(), letter));
                    shared.hang_at_data
                };
                if hang {
                    std::future::pending::<()>().await;
                }
                say(&mut stream, "250 taken").await;
            }
            "QUIT" => return,
            _ => say(&mut stream, "250 ok").await,
        }
    }
}

async fn say<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut BufStream<S>, line: &str) {
    let _ = stream.write_all(format!("{line}\r\n").as_bytes()).await; // the client may be gone
    let _ = stream.flush().await;
}

async fn hear<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut BufStream<S>) -> Option<String> {
    let mut line = String::new();
    match stream.read_line(&mut line).await {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(line.trim_end().to_owned()),
    }
}

fn channel(server: &Server, certificates: &Certificates, scratch: &Scratch, tls: &str, to: &[&str]) -> Channel {
    let password = scratch.file("password", HUSH);
    open(&format!(
        "kind = \"email\"\nhost = \"localhost\"\nport = {}\ntls = \"{tls}\"\nuser = \"walguard\"\nsecret_file = {password:?}\n\
         from = \"walguard <walguard@example.com>\"\nto = {to:?}\nca_file = {:?}\ntimeout = \"2s\"",
        server.address.port(),
        certificates.path("ca.crt"),
    ))
}

fn message() -> Message {
    let incident = wipe(0, "2025-12-17T06:14:59.12Z".parse().unwrap());
    let sending = Sending {
        channel: "mail".to_owned(),
        event: Event::Opened,
        key: "opened".to_owned(),
        due_at: incident.detected_at,
        late: None,
        repeated: false,
    };
    Message::of_incident(&incident, &sending, &setting())
}

async fn send(channel: &Channel, message: &Message) -> Result<(), SendError> {
    channel.send(message, &setting(), Timestamp::now()).await
}

#[tokio::test]
async fn a_letter_is_encrypted_both_ways_and_reads_well() {
    let (certificates, scratch) = (Certificates::make(), Scratch::new());
    for (tls, name) in [(Tls::Starttls, "starttls"), (Tls::Implicit, "implicit")] {
        let server = Server::start(&certificates, tls).await;
        let channel = channel(&server, &certificates, &scratch, name, &["oncall@example.com"]);
        send(&channel, &message()).await.unwrap();
        let (to, letter) = server.letters().remove(0);
        assert_eq!(to, "oncall@example.com");
        for line in [
            "From: walguard <walguard@example.com>",
            "To: oncall@example.com",
            "Message-ID: <main.00000001-000000001A2B3C40.mail.opened@example.com>",
            "References: <walguard.main.00000001-000000001A2B3C40@example.com>",
            "Auto-Submitted: auto-generated",
            "Importance: high",
        ] {
            assert!(letter.lines().any(|l| l == line), "{line}\n{letter}");
        }
        assert!(letter.contains("Subject: CRITICAL main: 18 tables emptied"), "{letter}");
        assert!(letter.contains("multipart/alternative") && letter.contains("text/plain"), "{letter}");
        assert_eq!(server.shared.lock().unwrap().logins.len(), 1);
    }
}

#[tokio::test]
async fn a_server_that_does_not_encrypt_gets_neither_password_nor_letter() {
    let (certificates, scratch) = (Certificates::make(), Scratch::new());
    let server = Server::start(&certificates, Tls::Stripped).await;
    let channel = channel(&server, &certificates, &scratch, "starttls", &["oncall@example.com"]);
    let error = send(&channel, &message()).await.unwrap_err();
    assert!(!format!("{error:?}").contains(HUSH), "{error:?}");
    let shared = server.shared.lock().unwrap();
    assert!(
        shared.letters.is_empty() && !shared.commands.iter().any(|c| c.starts_with("AUTH")),
        "{:?}",
        shared.commands
    );
}

#[tokio::test]
async fn a_server_with_a_certificate_of_somebody_else_gets_nothing() {
    let (certificates, others, scratch) = (Certificates::make(), Certificates::make(), Scratch::new());
    let server = Server::start(&certificates, Tls::Implicit).await;
    let channel = channel(&server, &others, &scratch, "implicit", &["oncall@example.com"]);
    let error = send(&channel, &message()).await.unwrap_err();
    assert!(server.letters().is_empty(), "{error:?}");
}

#[tokio::test]
async fn one_bad_address_keeps_the_alarm_from_nobody_else_and_nobody_gets_it_twice() {
    let (certificates, scratch) = (Certificates::make(), Scratch::new());
    let server = Server::start(&certificates, Tls::Implicit).await;
    let to = ["left@example.com", "oncall@example.com", "dba@example.com"];
    let channel = channel(&server, &certificates, &scratch, "implicit", &to);
    server.refuse("left@example.com", Some("550 no such user"));
    server.refuse("dba@example.com", Some("451 try later"));
    let error = send(&channel, &message()).await.unwrap_err();
    assert!(error.is_transient(), "one of them may get it later: {error:?}");
    server.refuse("dba@example.com", None);
    let error = send(&channel, &message()).await.unwrap_err();
    assert!(!error.is_transient() && error.to_string().contains("left@example.com"), "{error:?}");
    server.refuse("left@example.com", None);
    send(&channel, &message()).await.unwrap();
    let got: Vec<_> = server.letters().into_iter().map(|(to, _)| to).collect();
    assert_eq!(got, ["oncall@example.com", "dba@example.com", "left@example.com"]);
}

#[tokio::test]
async fn a_server_that_takes_the_letter_and_says_nothing_may_have_it() {
    let (certificates, scratch) = (Certificates::make(), Scratch::new());
    let server = Server::start(&certificates, Tls::Implicit).await;
    server.shared.lock().unwrap().hang_at_data = true;
    let channel = channel(&server, &certificates, &scratch, "implicit", &["oncall@example.com"]);
    let begin = std::time::Instant::now();
    let error = send(&channel, &message()).await.unwrap_err();
    assert!(error.is_transient() && error.maybe_taken(), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(60));
}
