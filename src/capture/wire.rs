//! Bytes of a socket -> frames of the protocol.
//!
//! `postgres-protocol` reads the messages; this file reads two itself: CopyBothResponse, which that crate does not know,
//! and CopyData, whose payload is handed on as a slice of the read buffer: WAL is not copied on its way to the caller.
#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What the read buffer grows by. Several CopyData messages of WAL (128 KiB at most, `MAX_SEND_SIZE` in
/// `replication/walsender.c`) fit, so that the end of one that did not come whole is moved once per several.
const CHUNK: usize = 1 << 20;

/// Free space below which a read is not worth a system call.
const READ_MIN: usize = 128 << 10;

/// The longest message before the server has proven who it is. Nothing of a start-up comes near it; libpq allows 30000
/// for an error, the longest of them.
pub(super) const STARTUP_MESSAGE_LENGTH_MAX: usize = 64 << 10;

/// The longest message after that. WAL and backups come in messages of at most 1 MiB (`XLOG_BLCKSZ` * 16 in the largest
/// build); a timeline history, in one row, has less than 100 bytes for each promotion.
pub(super) const MESSAGE_LENGTH_MAX: usize = 16 << 20;

/// The longest message of a stream of decoded rows, which holds a whole row: Postgres builds none longer than this
/// (`MaxAllocSize` in `utils/memutils.h`). Memory is taken as the bytes come.
pub(super) const ROW_LENGTH_MAX: usize = 1 << 30;

const COPY_DATA: u8 = b'd';
const COPY_BOTH_RESPONSE: u8 = b'W';

/// One message from the server.
pub(super) enum Frame {
    /// CopyBothResponse: data may flow both ways now.
    CopyBoth,
    /// CopyData: its payload.
    CopyData(Bytes),
    /// Any other message.
    Message(Message),
}

/// Takes the first message off `buffer`, or answers `None` and leaves it if it is not all there.
///
/// # Errors
/// If the bytes are not a message, or the message is longer than `length_max`. The buffer is of no use after that.
pub(super) fn parse(buffer: &mut BytesMut, length_max: usize) -> Result<Option<Frame>, String> {
    let Some((&[tag, a, b, c, d], _)) = buffer.split_first_chunk() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize; // counts itself, not the tag
    if length < 4 {
        return Err(format!("message `{}` has length {length}", tag.escape_ascii()));
    }
    if length > length_max {
        return Err(format!("message `{}` of {length} bytes; {length_max} are allowed", tag.escape_ascii()));
    }
    if buffer.len() < length + 1 {
        return Ok(None);
    }
    match tag {
        COPY_DATA => {
            let mut message = buffer.split_to(length + 1).freeze();
            message.advance(5);
            Ok(Some(Frame::CopyData(message)))
        }
        COPY_BOTH_RESPONSE => {
            buffer.advance(length + 1);
            Ok(Some(Frame::CopyBoth))
        }
        _ => match Message::parse(buffer) {
            Ok(Some(message)) => Ok(Some(Frame::Message(message))),
            // It is all there, so anything else is a fault of its content.
            Ok(None) => Err(format!("message `{}` is cut short", tag.escape_ascii())),
            Err(error) => Err(format!("message `{}`: {error}", tag.escape_ascii())),
        },
    }
}

/// A socket with its buffers. Every method is cancel safe: what was read or not yet written stays in the buffers.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    read: BytesMut,
    write: BytesMut,
    flushed: bool,
    length_max: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            write: BytesMut::new(),
            flushed: true,
            length_max: STARTUP_MESSAGE_LENGTH_MAX,
        }
    }

    /// Allows the long messages that only an authenticated server sends.
    pub(super) fn allow_long_messages(&mut self) {
        self.length_max = MESSAGE_LENGTH_MAX;
    }

    /// Allows messages that hold a whole row of a table.
    pub(super) fn allow_rows(&mut self) {
        self.length_max = ROW_LENGTH_MAX;
    }

    /// The messages that [`flush`](Self::flush) sends: append to it.
    pub(super) fn outgoing(&mut self) -> &mut BytesMut {
        &mut self.write
    }

    /// The next message that was read already.
    pub(super) fn buffered(&mut self) -> Result<Option<Frame>, String> {
        parse(&mut self.read, self.length_max)
    }

    /// Reads more bytes.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` when the server closed it.
    pub(super) async fn fill(&mut self) -> io::Result<()> {
        // Never more than one chunk beyond what has come: a length in a header allocates nothing.
        if self.read.capacity() - self.read.len() < READ_MIN.min(self.length_max) {
            self.read.reserve(CHUNK.min(self.length_max));
        }
        match self.stream.read_buf(&mut self.read).await? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it")),
            _ => Ok(()),
        }
    }

    /// Sends what is in [`outgoing`](Self::outgoing).
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while !self.write.is_empty() {
            self.flushed = false;
            if self.stream.write_buf(&mut self.write).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        if !self.flushed {
            self.stream.flush().await?;
            self.flushed = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("short");
        [&[tag], length.to_be_bytes().as_slice(), body].concat()
    }

    #[test]
    fn wal_is_a_slice_of_the_read_buffer() {
        let mut buffer = BytesMut::from(message(b'd', b"wal").as_slice());
        let address = buffer.as_ptr() as usize;
        let Ok(Some(Frame::CopyData(data))) = parse(&mut buffer, 100) else { panic!("no CopyData") };
        assert_eq!(data, "wal");
        assert_eq!(data.as_ptr() as usize, address + 5);
    }

    #[test]
    fn a_message_longer_than_allowed_is_refused_by_its_header_alone() {
        let mut buffer = BytesMut::from([b'd', 0x7F, 0xFF, 0xFF, 0xFF].as_slice());
        assert!(parse(&mut buffer, MESSAGE_LENGTH_MAX).is_err());
        let mut buffer = BytesMut::from([b'R', 0, 1, 0, 1].as_slice());
        assert!(parse(&mut buffer, STARTUP_MESSAGE_LENGTH_MAX).is_err());
    }

    #[tokio::test]
    async fn a_length_in_a_header_allocates_nothing() {
        let (mut server, client) = tokio::io::duplex(1024);
        let mut wire = Wire::new(client);
        wire.allow_long_messages();
        let mut header = vec![b'd'];
        header.extend(u32::try_from(MESSAGE_LENGTH_MAX).expect("fits").to_be_bytes());
        server.write_all(&header).await.expect("write");
        wire.fill().await.expect("read");
        assert!(wire.buffered().is_ok_and(|frame| frame.is_none()));
        assert!(wire.read.capacity() <= CHUNK, "{}", wire.read.capacity());
    }

    #[tokio::test]
    async fn messages_come_whole_however_they_were_cut() {
        let (mut server, client) = tokio::io::duplex(7);
        let sent = [message(b'd', &[7; 300]), message(b'W', &[0, 0, 0]), message(b'c', b"")].concat();
        let sender = tokio::spawn(async move { server.write_all(&sent).await.map(|()| server) });
        let mut wire = Wire::new(client);
        let mut seen = Vec::new();
        while seen.len() < 3 {
            match wire.buffered().expect("well formed") {
                Some(Frame::CopyData(data)) => seen.push(data.len()),
                Some(Frame::CopyBoth) => seen.push(1000),
                Some(Frame::Message(Message::CopyDone)) => seen.push(2000),
                Some(Frame::Message(_)) => panic!("another message"),
                None => wire.fill().await.expect("read"),
            }
        }
        assert_eq!(seen, [300, 1000, 2000]);
        drop(sender.await);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..200), tag in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..64)) {
            for input in [bytes, message(tag, &body)] {
                let mut buffer = BytesMut::from(input.as_slice());
                while let Ok(Some(frame)) = parse(&mut buffer, STARTUP_MESSAGE_LENGTH_MAX) {
                    exercise(&frame);
                }
                prop_assert!(buffer.capacity() <= input.len() + 64);
            }
        }
    }

    /// Reads every field that the rest of the module reads.
    fn exercise(frame: &Frame) {
        use fallible_iterator::FallibleIterator;
        let Frame::Message(message) = frame else { return };
        match message {
            Message::ErrorResponse(body) => drop(crate::capture::ServerError::read(body)),
            Message::DataRow(body) => drop(crate::capture::connection::read_row(body)),
            Message::AuthenticationSasl(body) => drop(body.mechanisms().map(|m| Ok(m.to_owned())).collect::<Vec<_>>()),
            Message::ParameterStatus(body) => drop((body.name().map(str::to_owned), body.value().map(str::to_owned))),
            Message::CommandComplete(body) => drop(body.tag().map(str::to_owned)),
            _ => {}
        }
    }
}
