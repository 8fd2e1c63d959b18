//! Port numbers for programs that open them themselves, and again after each of their deaths.

use std::fs::{self, File};
use std::net::TcpListener;

use super::shared_dir;

/// Below the range from which the kernel gives out port numbers, so that nothing takes one between two starts.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A port number that no other test of this user has, and the lock that keeps it so.
pub(super) fn take_port() -> (u16, File) {
    let dir = shared_dir().join("ports");
    fs::create_dir_all(&dir).unwrap();
    loop {
        let port = fastrand::u16(PORTS);
        let lock = File::options().create(true).append(true).open(dir.join(port.to_string())).unwrap();
        if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return (port, lock);
        }
    }
}
