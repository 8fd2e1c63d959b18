//! The generic webhook: the message as JSON, signed.
//!
//! ```text
//! X-Walguard-Delivery: <cluster>/<incident>/<channel>/<event>     the same for every try of one message
//! X-Walguard-Signature: t=<unix seconds>,v1=<hexadecimal HMAC-SHA256 of "<t>.<body>" under the channel's secret>
//! ```
//!
//! A receiver computes the HMAC over the bytes that it got, compares it in constant time, and refuses a `t` that is some
//! minutes old: a request that somebody recorded is then worth nothing.

use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::Timestamp;
use reqwest::header::{HeaderMap, HeaderValue};
use sha2::Sha256;

use super::http::Request;
use super::message::Message;
use super::secret::Secret;

/// The header that names the message.
pub const DELIVERY_HEADER: &str = "x-walguard-delivery";
/// The header with time and signature.
pub const SIGNATURE_HEADER: &str = "x-walguard-signature";

pub(super) fn request(message: &Message, secret: Option<&Secret>, now: Timestamp) -> Request {
    let body = serde_json::to_vec(message).expect("a message becomes JSON");
    let mut headers = HeaderMap::new();
    if let Ok(delivery) = HeaderValue::from_str(&message.delivery) {
        headers.insert("idempotency-key", delivery.clone());
        headers.insert(DELIVERY_HEADER, delivery);
    }
    if let Some(secret) = secret {
        let signature = signature(secret, now.as_second(), &body);
        headers.insert(SIGNATURE_HEADER, HeaderValue::from_str(&signature).expect("hexadecimal digits are a header"));
    }
    Request { headers, basic: None, body: body.into() }
}

/// `t=...,v1=...`.
fn signature(secret: &Secret, second: i64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes keys of any length");
    mac.update(format!("{second}.").as_bytes());
    mac.update(body);
    let digest = mac.finalize().into_bytes();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={second},v1={hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected value was made with another program: `printf '1765952040.{"a":1}' | openssl dgst -sha256 -hmac key`.
    #[test]
    fn a_signature_is_what_openssl_computes() {
        let signature = signature(&Secret::new("key".to_owned()), 1_765_952_040, b"{\"a\":1}");
        assert_eq!(signature, "t=1765952040,v1=f2a640452125336ad066d101637c7cbe6808d474873f594466d9c21701fcd50e");
    }
}
