//! Proving who we are, and seeing the server's proof: clear text, MD5, SCRAM-SHA-256 with and without channel binding.

use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;

use super::connection::Connection;
use super::conninfo::{ChannelBinding, Secret};
use super::wire::Frame;
use super::{CaptureError, ServerError};

/// What we have to prove ourselves with.
pub(super) struct Credentials<'a> {
    pub(super) user: &'a str,
    pub(super) password: Option<&'a Secret>,
    pub(super) channel_binding: ChannelBinding,
    /// The server's certificate as channel binding wants it; `None` without TLS.
    pub(super) server_end_point: Option<Vec<u8>>,
    /// Whether a password may be sent as it is: the way is encrypted or inside the machine, or the user said that plain
    /// text will do.
    pub(super) clear_text_allowed: bool,
}

impl Credentials<'_> {
    /// Answers the server's requests until it lets us in.
    pub(super) async fn authenticate(&self, connection: &mut Connection) -> Result<(), CaptureError> {
        let mut bound = false;
        loop {
            match receive(connection).await? {
                Message::AuthenticationOk if self.channel_binding == ChannelBinding::Require && !bound => {
                    return Err(refuse(connection, "channel_binding=require, but the server did not ask for SCRAM"));
                }
                Message::AuthenticationOk => return Ok(()),
                Message::AuthenticationCleartextPassword => {
                    self.require_unbound(connection)?;
                    if !self.clear_text_allowed {
                        let problem = "the server asks for the password in clear text over an unencrypted connection";
                        return Err(refuse(connection, problem));
                    }
                    let password = self.password(connection)?.reveal().as_bytes();
                    send(connection, |buffer| frontend::password_message(password, buffer)).await?;
                }
                Message::AuthenticationMd5Password(body) => {
                    self.require_unbound(connection)?;
                    let password = self.password(connection)?.reveal().as_bytes();
                    let hash = md5_hash(self.user.as_bytes(), password, body.salt());
                    send(connection, |buffer| frontend::password_message(hash.as_bytes(), buffer)).await?;
                }
                Message::AuthenticationSasl(body) => bound = self.scram(connection, &body).await?,
                _ => {
                    let problem = "the server asks for an authentication method other than password, md5, \
                                   scram-sha-256, cert, peer or trust";
                    return Err(refuse(connection, problem));
                }
            }
        }
    }

    /// SCRAM-SHA-256 (RFC 5802, RFC 7677). True if it was bound to the TLS session.
    async fn scram(&self, connection: &mut Connection, body: &AuthenticationSaslBody) -> Result<bool, CaptureError> {
        let offered: Vec<String> = body
            .mechanisms()
            .map(|mechanism| Ok(mechanism.to_owned()))
            .collect()
            .map_err(|error| CaptureError::protocol(error.to_string()))?;
        let offers = |mechanism: &str| offered.iter().any(|o| o == mechanism);
        let end_point = self.server_end_point.clone().filter(|_| self.channel_binding != ChannelBinding::Disable);
        let (mechanism, binding) = match end_point {
            Some(end_point) if offers(SCRAM_SHA_256_PLUS) => {
                (SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(end_point))
            }
            // "We could bind, you did not offer": a server that did offer, and was cut down on the way, notices.
            Some(_) => (SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };
        if !offers(mechanism) {
            return Err(refuse(connection, "the server offers no SASL mechanism that walguard knows"));
        }
        if mechanism != SCRAM_SHA_256_PLUS {
            self.require_unbound(connection)?;
        }
        let password = self.password(connection)?.reveal().as_bytes();
        let mut scram = ScramSha256::new(password, binding);
        send(connection, |buffer| frontend::sasl_initial_response(mechanism, scram.message(), buffer)).await?;
        let Message::AuthenticationSaslContinue(body) = receive(connection).await? else {
            return Err(CaptureError::protocol("expected AuthenticationSASLContinue"));
        };
        scram.update(body.data()).map_err(|error| CaptureError::protocol(format!("SCRAM: {error}")))?;
        send(connection, |buffer| frontend::sasl_response(scram.message(), buffer)).await?;
        let Message::AuthenticationSaslFinal(body) = receive(connection).await? else {
            return Err(CaptureError::protocol("expected AuthenticationSASLFinal"));
        };
        scram
            .finish(body.data())
            .map_err(|error| refuse(connection, &format!("the server does not know the password: {error}")))?;
        Ok(mechanism == SCRAM_SHA_256_PLUS)
    }

    fn require_unbound(&self, connection: &Connection) -> Result<(), CaptureError> {
        match self.channel_binding {
            ChannelBinding::Require => {
                Err(refuse(connection, "channel_binding=require, but the server and the connection do not allow it"))
            }
            ChannelBinding::Disable | ChannelBinding::Prefer => Ok(()),
        }
    }

    fn password(&self, connection: &Connection) -> Result<&Secret, CaptureError> {
        self.password.ok_or_else(|| CaptureError::Authentication {
            endpoint: connection.endpoint().to_owned(),
            error: Box::new(ServerError {
                code: "28P01".to_owned(),
                message: format!("the server asks for the password of role \"{}\", and none was given", self.user),
                ..ServerError::default()
            }),
        })
    }
}

/// We do not go on, though the server would.
fn refuse(connection: &Connection, problem: &str) -> CaptureError {
    let error = ServerError { message: problem.to_owned(), ..ServerError::default() };
    CaptureError::Authentication { endpoint: connection.endpoint().to_owned(), error: Box::new(error) }
}

async fn receive(connection: &mut Connection) -> Result<Message, CaptureError> {
    match connection.receive().await? {
        Frame::Message(message) => Ok(message),
        Frame::CopyBoth | Frame::CopyData(_) => Err(CaptureError::protocol("COPY before authentication")),
    }
}

async fn send(
    connection: &mut Connection,
    write: impl FnOnce(&mut bytes::BytesMut) -> std::io::Result<()>,
) -> Result<(), CaptureError> {
    write(connection.outgoing()).map_err(|error| CaptureError::protocol(error.to_string()))?;
    connection.flush().await
}
