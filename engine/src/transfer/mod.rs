//! Pages on their way to other hosts: CRIU's page server and its clients.

pub mod client;
pub mod lazy;
pub mod link;
pub mod server;
pub mod source;
pub mod tls;
pub mod wire;
