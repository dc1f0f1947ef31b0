//! The sockets of a server: addresses and files that listen before a model is loaded.
//!
//! The file of a Unix socket is removed when the server ends. One that was left behind is replaced if nobody
//! listens on it any more.

use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use server::Listener;
use tokio::net::UnixSocket;
use tokio::runtime::Builder;

use crate::args_api::DoorArgs;
use crate::exit::{Failure, Result};

/// Connections that may wait to be taken in at a Unix socket.
const BACKLOG: u32 = 1024;

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// The file of a socket, removed with this.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whoever removed it before wanted just that.
        let _gone = fs::remove_file(&self.0);
    }
}

/// Who may connect to a socket in the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Whom the process's umask lets.
    Umask,
    /// The user that the server runs as.
    Owner,
}

/// The sockets of a server.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) public: Socket,
    pub(crate) admin: Option<Socket>,
}

impl Sockets {
    /// The operator's socket beside a public one.
    pub(crate) fn new(public: Socket, args: &DoorArgs) -> Result<Self> {
        Ok(Self { public, admin: admin(args)? })
    }

    /// Where clients find the server.
    pub(crate) fn name(&self) -> std::io::Result<String> {
        match &self.public {
            Socket::Tcp(listener) => Ok(format!("http://{}/v1", listener.local_addr()?)),
            Socket::Unix(_, file) => Ok(format!("unix:{}", file.0.display())),
        }
    }

    /// Where the operator finds it.
    pub(crate) fn admin_name(&self) -> std::io::Result<Option<String>> {
        match &self.admin {
            None => Ok(None),
            Some(Socket::Tcp(listener)) => Ok(Some(format!("http://{}", listener.local_addr()?))),
            Some(Socket::Unix(_, file)) => Ok(Some(format!("unix:{}", file.0.display()))),
        }
    }
}

impl Socket {
    /// The socket as the server takes it, within a runtime, and its file, to be kept while it is served.
    pub(crate) fn listener(self) -> std::io::Result<(Listener, Option<SocketFile>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                (Listener::Tcp(tokio::net::TcpListener::from_std(listener)?), None)
            }
            Self::Unix(listener, file) => {
                (Listener::Unix(tokio::net::UnixListener::from_std(listener)?), Some(file))
            }
        })
    }
}

/// The socket of `--admin-listen`, if there is one.
fn admin(args: &DoorArgs) -> Result<Option<Socket>> {
    let Some(address) = &args.admin_listen else {
        return match args.admin_api_key.is_empty() {
            true => Ok(None),
            false => Err(Failure::usage("--admin-api-key has no effect without --admin-listen")),
        };
    };
    if let Some(path) = address.strip_prefix("unix:") {
        return unix(Path::new(path), Access::Owner).map(Some);
    }
    let listener = tcp(address, address)?;
    let failed = |error: std::io::Error| Failure::running(format!("{address}: {error}"));
    if args.admin_api_key.is_empty() && !listener.local_addr().map_err(failed)?.ip().is_loopback() {
        return Err(Failure::usage(format!(
            "--admin-listen {address} can be reached from other machines, --admin-api-key is needed there"
        )));
    }
    Ok(Some(Socket::Tcp(listener)))
}

/// Takes the address, which messages call `name`.
pub(crate) fn tcp(name: &str, address: impl ToSocketAddrs) -> Result<TcpListener> {
    let failed = |error: std::io::Error| Failure::running(format!("{name}: {error}"));
    let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::InvalidInput => {
            Failure::usage(format!("{name}: expected HOST:PORT to listen on"))
        }
        _ => failed(error),
    })?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Makes a socket at `path`.
pub(crate) fn unix(path: &Path, access: Access) -> Result<Socket> {
    let failed = |error: std::io::Error| Failure::running(format!("{}: {error}", path.display()));
    if path.as_os_str().is_empty() {
        return Err(Failure::usage("the path of a Unix socket is empty"));
    }
    remove_stale(path)?;
    let runtime = Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let _context = runtime.enter();
    let socket = UnixSocket::new_stream().map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    let file = SocketFile(path.to_owned());
    if access == Access::Owner {
        // Nobody can connect before it listens.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    }
    let listener = socket.listen(BACKLOG).and_then(tokio::net::UnixListener::into_std);
    Ok(Socket::Unix(listener.map_err(failed)?, file))
}

/// Removes a socket that was left behind.
fn remove_stale(path: &Path) -> Result<()> {
    let name = path.display();
    let failed = |error: std::io::Error| Failure::running(format!("{name}: {error}"));
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !found.file_type().is_socket() {
        return Err(Failure::running(format!("{name}: a file is in the way, and is no socket")));
    }
    match UnixStream::connect(path) {
        Ok(_answered) => Err(Failure::running(format!("{name}: another process listens on it"))),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_its_owners_and_goes_with_the_server() {
        let path = std::env::temp_dir().join(format!("engine-socket-{}", std::process::id()));
        let socket = unix(&path, Access::Owner).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let taken = unix(&path, Access::Owner).unwrap_err().to_string();
        assert_eq!(taken, format!("{}: another process listens on it", path.display()));
        drop(socket);
        assert!(!path.exists());
        // Left behind by a process that was killed.
        drop(UnixListener::bind(&path).unwrap());
        drop(unix(&path, Access::Umask).unwrap());
        assert!(!path.exists());
        fs::write(&path, "mine").unwrap();
        let wrong = unix(&path, Access::Owner).unwrap_err().to_string();
        assert!(wrong.ends_with("a file is in the way, and is no socket"), "{wrong}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        fs::remove_file(&path).unwrap();
    }
}
