//! The flags of the server's doors: who administrates, which pages may ask, what a connection may take.

use std::str::FromStr;

use clap::Args;

/// A list of strings, as JSON spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JsonList(pub(crate) Vec<String>);

impl FromStr for JsonList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        serde_json::from_str(text)
            .map(Self)
            .map_err(|_| "expected a JSON list of strings, such as [\"*\"]".to_owned())
    }
}

/// Flags of every command that serves, beside those of the API.
#[derive(Clone, Debug, Args)]
pub(crate) struct DoorArgs {
    /// Where /pause, /resume, /is_paused and /update_weights_from_disk are answered [default: nowhere]
    #[arg(long, value_name = "HOST:PORT|unix:/PATH")]
    pub(crate) admin_listen: Option<String>,
    /// Key the operator must show there; may be repeated; needed unless the address is this machine's own
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    pub(crate) admin_api_key: Vec<String>,
    /// Sites whose pages may ask, a JSON list [default: none]
    #[arg(long, value_name = "LIST")]
    pub(crate) allowed_origins: Option<JsonList>,
    /// Methods they may use, with --allowed-origins [default: ["*"]]
    #[arg(long, value_name = "LIST")]
    pub(crate) allowed_methods: Option<JsonList>,
    /// Headers they may send, with --allowed-origins [default: ["*"]]
    #[arg(long, value_name = "LIST")]
    pub(crate) allowed_headers: Option<JsonList>,
    /// Let browsers send those pages' credentials; the sites must be named
    #[arg(long)]
    pub(crate) allow_credentials: bool,
    /// Log each request's ids and parameters, never its text
    #[arg(long)]
    pub(crate) enable_log_requests: bool,
    /// Connections that may be open; further ones get 503
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub(crate) max_connections: u32,
    /// Longest head of a request; a longer one gets 431
    #[arg(long, value_name = "BYTES", value_parser = crate::model::count, default_value = "64KiB")]
    pub(crate) h11_max_incomplete_event_size: u64,
    /// Most header lines of a request; more get 431
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) h11_max_header_count: usize,
    /// Seconds for the head of a request, and for the next one of a connection; then it is closed
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(crate) header_timeout: f64,
    /// Seconds for the body of a request; then it gets 408
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(crate) body_timeout: f64,
    /// Seconds that a client may take no byte of its answer; then the request is aborted
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(crate) stall_timeout: f64,
}
