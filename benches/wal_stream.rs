//! How fast WAL comes in: a server on loopback that does nothing but send, so that only our side is measured.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use walguard::capture::{ConnInfo, Environment, Start, StreamEvent, Walsender};
use walguard::pg::{Lsn, Position, TimelineId};

/// WAL for one measurement.
const BYTES: u64 = 256 << 20;
/// What a walsender sends at once (`MAX_SEND_SIZE` in `replication/walsender.c`).
const MESSAGE: usize = 128 << 10;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("short");
    [&[tag], length.to_be_bytes().as_slice(), body].concat()
}

/// Reads a message's body; the first has no tag.
fn read(socket: &mut TcpStream, tagged: bool) -> Vec<u8> {
    let mut head = vec![0; if tagged { 5 } else { 4 }];
    socket.read_exact(&mut head).expect("head");
    let length: [u8; 4] = head[head.len() - 4..].try_into().expect("four bytes");
    let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
    socket.read_exact(&mut body).expect("body");
    body
}

/// Lets one client in and sends it WAL until it goes.
fn serve(mut socket: TcpStream) {
    read(&mut socket, false);
    let ready = message(b'Z', b"I");
    let welcome = [message(b'R', &[0; 4]), message(b'S', b"server_version\x0018.4\0"), ready].concat();
    socket.write_all(&welcome).expect("welcome");
    read(&mut socket, true);
    socket.write_all(&message(b'W', &[0; 3])).expect("begin");
    let mut wal = message(b'd', &[b"w", [0_u8; 24].as_slice(), &[7; MESSAGE]].concat());
    let mut at = 0_u64;
    loop {
        wal[6..14].copy_from_slice(&at.to_be_bytes());
        if socket.write_all(&wal).is_err() {
            return; // it has enough
        }
        at += MESSAGE as u64;
    }
}

fn receive(criterion: &mut Criterion) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for socket in listener.incoming() {
            thread::spawn(|| serve(socket.expect("a client")));
        }
    });
    let text = format!("host=127.0.0.1 port={port} user=bench sslmode=disable");
    let info = ConnInfo::parse(&text, &Environment::default()).expect("a connection string");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("wal stream");
    group.throughput(Throughput::Bytes(BYTES)).sample_size(10);
    group.bench_function("receive over loopback", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                let from = Position { timeline: TimelineId::FIRST, lsn: Lsn::ZERO };
                let walsender = Walsender::connect(&info).await.expect("let in");
                let Start::Streaming(mut stream) = walsender.start_physical(None, from).await.expect("started") else {
                    panic!("the timeline ended");
                };
                let mut received = 0;
                while received < BYTES {
                    if let StreamEvent::Wal { data, .. } = stream.next().await.expect("WAL") {
                        received += data.len() as u64;
                    }
                }
            });
        });
    });
}

criterion_group!(benches, receive);
criterion_main!(benches);
