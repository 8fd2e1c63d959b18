//! `START_REPLICATION` -> WAL.

use bytes::{Buf, BufMut, Bytes};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::time::{Duration, Instant, timeout};

use super::connection::read_row;
use super::walsender::{Walsender, next_timeline};
use super::wire::Frame;
use super::{CaptureError, Feedback};
use crate::pg::{Lsn, PgTime, Position, TimelineId};

/// What comes over a WAL stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// WAL. Each piece begins where the one before it ended.
    Wal {
        /// Where the bytes begin.
        start: Lsn,
        /// How far the server's WAL was flushed when it sent this.
        server_end: Lsn,
        /// The server's clock when it sent this.
        sent_at: PgTime,
        /// The bytes: a slice of the read buffer (1 MiB), which lives as long as the slice.
        data: Bytes,
    },
    /// The server is alive.
    Keepalive {
        /// How far the server's WAL was flushed.
        server_end: Lsn,
        /// The server's clock.
        sent_at: PgTime,
        /// The server wants feedback at once, or will soon take us for dead.
        reply_requested: bool,
    },
    /// The timeline ended and everything of it was sent. [`WalStream::finish`] gives the walsender back, to start on the
    /// next timeline.
    EndOfTimeline {
        /// The next timeline and where it branched off; WAL received past that place is not part of it.
        next: Option<Position>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// WAL comes.
    Streaming,
    /// The server sent CopyDone; its result is awaited.
    Ending { next: Option<Position> },
    /// The walsender is idle again.
    Ended { next: Option<Position> },
}

/// A running stream of WAL.
#[derive(Debug)]
pub struct WalStream {
    walsender: Walsender,
    state: State,
    position: Position,
    /// Each piece begins where the one before it ended. Decoded changes come in the order of their commits instead, each
    /// with the place of its own record.
    is_contiguous: bool,
    feedback: Feedback,
    heard_at: Instant,
    /// When we asked for a sign of life that has not come.
    asked_at: Option<Instant>,
}

impl WalStream {
    pub(super) fn new(walsender: Walsender, from: Position) -> Self {
        Self {
            walsender,
            state: State::Streaming,
            position: from,
            is_contiguous: true,
            feedback: Feedback::default(),
            heard_at: Instant::now(),
            asked_at: None,
        }
    }

    /// A stream of decoded changes. Its [`StreamEvent::Wal`] holds one message of the output plugin each, with the place
    /// of the record that it tells of; [`WalStream::position`] says nothing.
    pub(super) fn of_changes(walsender: Walsender, from: Lsn) -> Self {
        let from = Position { timeline: TimelineId::FIRST, lsn: from };
        Self { is_contiguous: false, ..Self::new(walsender, from) }
    }

    /// Where the next WAL begins.
    pub const fn position(&self) -> Position {
        self.position
    }

    /// The host and port that the WAL comes from.
    pub fn endpoint(&self) -> &str {
        self.walsender.endpoint()
    }

    /// The next event. Cancel safe: an event that was not returned is returned by the next call.
    ///
    /// A server from which nothing is heard for half of [`Config::receive_timeout`](super::Config::receive_timeout) is
    /// asked for a sign of life, and given up after the other half.
    ///
    /// # Errors
    /// [`CaptureError::Unreachable`] and [`CaptureError::Unavailable`] pass (the connection broke, the server stops): connect
    /// again and go on from [`position`](Self::position). [`CaptureError::WalRemoved`] when the WAL is gone.
    pub async fn next(&mut self) -> Result<StreamEvent, CaptureError> {
        loop {
            if let State::Ended { next } = self.state {
                return Ok(StreamEvent::EndOfTimeline { next });
            }
            if let Some(frame) = self.walsender.connection().buffered()? {
                self.heard_at = Instant::now();
                self.asked_at = None;
                if let Some(event) = self.take(frame)? {
                    return Ok(event);
                }
                continue;
            }
            self.fill().await?;
        }
    }

    /// Waits for bytes, and asks for them when none come.
    async fn fill(&mut self) -> Result<(), CaptureError> {
        let half = self.walsender.receive_timeout() / 2;
        let since = self.asked_at.unwrap_or(self.heard_at);
        let patience = (since + half).saturating_duration_since(Instant::now());
        let connection = self.walsender.connection();
        let exchange = async {
            connection.flush().await?;
            connection.fill().await
        };
        // A read that is ready counts even if the time is up: we may be the one who was busy.
        if let Ok(result) = timeout(patience.max(Duration::from_millis(1)), exchange).await {
            return result;
        }
        if self.asked_at.is_some() {
            let seconds = self.heard_at.elapsed().as_secs_f32();
            let what = format!("nothing was heard from {} for {seconds:.0} s", self.endpoint());
            return Err(CaptureError::Unreachable { what, source: None });
        }
        self.asked_at = Some(Instant::now());
        if self.state == State::Streaming {
            self.write_feedback(Feedback { reply_requested: true, ..self.feedback });
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame) -> Result<Option<StreamEvent>, CaptureError> {
        match (self.state, frame) {
            (State::Streaming, Frame::CopyData(payload)) => self.take_data(payload).map(Some),
            (State::Streaming, Frame::Message(Message::CopyDone)) => {
                frontend::copy_done(self.walsender.connection().outgoing());
                self.state = State::Ending { next: None };
                Ok(None)
            }
            // A server that shuts down sends everything, then ends the command and closes (`WalSndDone`).
            (State::Streaming, Frame::Message(Message::CommandComplete(_))) => {
                let what = format!("{} shuts down", self.endpoint());
                Err(CaptureError::Unreachable { what, source: None })
            }
            (State::Ending { .. }, Frame::Message(Message::DataRow(body))) => {
                self.state = State::Ending { next: Some(next_timeline(&read_row(&body)?)?) };
                Ok(None)
            }
            (State::Ending { .. }, Frame::Message(Message::RowDescription(_) | Message::CommandComplete(_))) => {
                Ok(None)
            }
            (State::Ending { next }, Frame::Message(Message::ReadyForQuery(_))) => {
                self.state = State::Ended { next };
                Ok(None)
            }
            _ => Err(CaptureError::protocol("an unexpected message in a WAL stream")),
        }
    }

    /// XLogData (`w`) and primary keepalive (`k`).
    fn take_data(&mut self, mut payload: Bytes) -> Result<StreamEvent, CaptureError> {
        let event = read_data(&mut payload)?;
        if let StreamEvent::Wal { start, data, .. } = &event
            && self.is_contiguous
        {
            if *start != self.position.lsn {
                let expected = self.position.lsn;
                return Err(CaptureError::protocol(format!("WAL at {start} where {expected} was expected")));
            }
            self.position.lsn = start
                .checked_add(data.len() as u64)
                .ok_or_else(|| CaptureError::protocol(format!("WAL at {start} goes past the end of all WAL")))?;
        }
        Ok(event)
    }

    /// Tells the server how far we are. Cancel safe: the message goes out with the next call, whole.
    ///
    /// # Errors
    /// If the connection broke.
    pub async fn send_feedback(&mut self, feedback: Feedback) -> Result<(), CaptureError> {
        self.feedback = feedback;
        if self.state != State::Streaming {
            return Ok(()); // nobody listens any more
        }
        self.write_feedback(feedback);
        self.walsender.connection().flush().await
    }

    /// Standby status update (`r`).
    fn write_feedback(&mut self, feedback: Feedback) {
        /// CopyData with 34 bytes: kind, write, flush, apply, our clock, reply requested.
        const LENGTH: u32 = 4 + 1 + 8 * 4 + 1;
        let now = PgTime::from(jiff::Timestamp::now());
        let buffer = self.walsender.connection().outgoing();
        buffer.put_u8(b'd');
        buffer.put_u32(LENGTH);
        buffer.put_u8(b'r');
        buffer.put_u64(feedback.write.bytes());
        buffer.put_u64(feedback.flush.bytes());
        buffer.put_u64(feedback.apply.bytes());
        buffer.put_i64(now.micros());
        buffer.put_u8(u8::from(feedback.reply_requested));
    }

    /// Ends the stream and gives the connection back. WAL that is on its way is dropped.
    ///
    /// # Errors
    /// If the connection breaks, or the server does not end the stream within the receive timeout.
    pub async fn finish(mut self) -> Result<Walsender, CaptureError> {
        let limit = self.walsender.receive_timeout();
        let endpoint = self.endpoint().to_owned();
        let result = timeout(limit, self.end()).await;
        result.unwrap_or_else(|_| Err(CaptureError::silent(&endpoint, "end the stream", limit)))?;
        Ok(self.walsender)
    }

    async fn end(&mut self) -> Result<(), CaptureError> {
        let connection = self.walsender.connection();
        if self.state == State::Streaming {
            frontend::copy_done(connection.outgoing());
        }
        connection.flush().await?;
        connection.settle().await
    }
}

/// Reads the payload of a CopyData message of a WAL stream.
fn read_data(payload: &mut Bytes) -> Result<StreamEvent, CaptureError> {
    let short = || CaptureError::protocol("a replication message is cut short");
    let kind = payload.try_get_u8().map_err(|_| short())?;
    match kind {
        b'w' => Ok(StreamEvent::Wal {
            start: Lsn::new(payload.try_get_u64().map_err(|_| short())?),
            server_end: Lsn::new(payload.try_get_u64().map_err(|_| short())?),
            sent_at: PgTime::from_micros(payload.try_get_i64().map_err(|_| short())?),
            data: std::mem::take(payload),
        }),
        b'k' => Ok(StreamEvent::Keepalive {
            server_end: Lsn::new(payload.try_get_u64().map_err(|_| short())?),
            sent_at: PgTime::from_micros(payload.try_get_i64().map_err(|_| short())?),
            reply_requested: payload.try_get_u8().map_err(|_| short())? != 0,
        }),
        other => Err(CaptureError::protocol(format!("replication message `{}`", other.escape_ascii()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wal_and_keepalives_are_read_as_the_server_sends_them() {
        let mut wal = vec![b'w'];
        for number in [0x0100_0000_u64, 0x0200_0000, 7] {
            wal.extend(number.to_be_bytes());
        }
        wal.extend(b"bytes");
        let event = read_data(&mut Bytes::from(wal)).unwrap();
        let expected = StreamEvent::Wal {
            start: Lsn::new(0x0100_0000),
            server_end: Lsn::new(0x0200_0000),
            sent_at: PgTime::from_micros(7),
            data: Bytes::from_static(b"bytes"),
        };
        assert_eq!(event, expected);
        let mut keepalive = vec![b'k'];
        keepalive.extend(9_u64.to_be_bytes());
        keepalive.extend(8_u64.to_be_bytes());
        keepalive.push(1);
        let event = read_data(&mut Bytes::from(keepalive)).unwrap();
        let expected =
            StreamEvent::Keepalive { server_end: Lsn::new(9), sent_at: PgTime::from_micros(8), reply_requested: true };
        assert_eq!(event, expected);
    }

    proptest! {
        #[test]
        fn no_replication_message_panics_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read_data(&mut Bytes::from(bytes));
        }
    }
}
