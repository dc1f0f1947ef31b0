//! The sockets of a server: addresses and files that are found free before a model is loaded, and listen after.
//!
//! Until then nobody can connect, so that nobody waits for an answer that cannot come yet. An address is held
//! meanwhile; a file is not, as one that nobody listens on would be taken for one that was left behind. The
//! file of a Unix socket is removed when the server ends. One that was left behind is replaced if nobody
//! listens on it any more.

use std::fs;
use std::io;
use std::io::ErrorKind;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use server::Listener;
use tokio::net::{TcpSocket, UnixSocket};

use crate::args_api::DoorArgs;
use crate::exit::{Failure, Result};

/// Connections that may wait to be taken in.
const BACKLOG: u32 = 1024;

/// Where a server is going to listen.
#[derive(Debug)]
pub(crate) enum Socket {
    /// An address that is held.
    Tcp(TcpSocket),
    /// A path where a socket could be made, and who may connect to it.
    Unix(PathBuf, Access),
}

/// The file of a socket, removed with this.
#[derive(Debug)]
#[must_use = "the file is removed when this is dropped"]
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
    pub(crate) fn name(&self) -> io::Result<String> {
        self.public.name("/v1")
    }

    /// Where the operator finds it.
    pub(crate) fn admin_name(&self) -> io::Result<Option<String>> {
        self.admin.as_ref().map(|socket| socket.name("")).transpose()
    }
}

impl Socket {
    /// Where it is; of an address, `path` there.
    fn name(&self, path: &str) -> io::Result<String> {
        Ok(match self {
            Self::Tcp(socket) => format!("http://{}{path}", socket.local_addr()?),
            Self::Unix(path, _) => format!("unix:{}", path.display()),
        })
    }

    /// Listens, within a runtime: the socket as the server takes it, and its file, to be kept while it is
    /// served.
    pub(crate) fn listen(self) -> Result<(Listener, Option<SocketFile>)> {
        match self {
            Self::Tcp(socket) => {
                let name = socket.local_addr().map_or("server".to_owned(), |at| at.to_string());
                let listener = socket.set_reuseaddr(true).and_then(|()| socket.listen(BACKLOG));
                let failed = |error: io::Error| Failure::running(format!("{name}: {error}"));
                Ok((Listener::Tcp(listener.map_err(failed)?), None))
            }
            Self::Unix(path, access) => {
                let (socket, file) = bind(&path, access)?;
                let listener = socket.listen(BACKLOG);
                let failed = |error: io::Error| Failure::unwritable(&path, &error);
                Ok((Listener::Unix(listener.map_err(failed)?), Some(file)))
            }
        }
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
    let socket = tcp(address, address)?;
    let failed = |error: io::Error| Failure::running(format!("{address}: {error}"));
    if args.admin_api_key.is_empty() && !socket.local_addr().map_err(failed)?.ip().is_loopback() {
        return Err(Failure::usage(format!(
            "--admin-listen {address} can be reached from other machines, --admin-api-key is needed there"
        )));
    }
    Ok(Some(Socket::Tcp(socket)))
}

/// Takes the address, which messages call `name`.
pub(crate) fn tcp(name: &str, address: impl ToSocketAddrs) -> Result<TcpSocket> {
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::InvalidInput => {
            Failure::usage(format!("{name}: expected HOST:PORT to listen on"))
        }
        _ => Failure::running(format!("{name}: {error}")),
    };
    let hold = |address: SocketAddr| {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        // A process that was killed leaves connections behind, which are not in the way then. Once the
        // address is held it is nobody else's, which it would be until somebody listens.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.set_reuseaddr(false)?;
        Ok(socket)
    };
    let mut last = io::Error::other("the name has no address");
    for address in address.to_socket_addrs().map_err(failed)? {
        match hold(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// Finds out whether a socket can be made at `path`, and leaves no file there.
pub(crate) fn unix(path: &Path, access: Access) -> Result<Socket> {
    drop(bind(path, access)?);
    Ok(Socket::Unix(path.to_owned(), access))
}

/// Makes a socket at `path`, which does not listen yet.
fn bind(path: &Path, access: Access) -> Result<(UnixSocket, SocketFile)> {
    let failed = |error: io::Error| Failure::running(format!("{}: {error}", path.display()));
    if path.as_os_str().is_empty() {
        return Err(Failure::usage("the path of a Unix socket is empty"));
    }
    remove_stale(path)?;
    let socket = UnixSocket::new_stream().map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    let file = SocketFile(path.to_owned());
    if access == Access::Owner {
        // Nobody can connect before it listens.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    }
    Ok((socket, file))
}

/// Removes a socket that was left behind.
fn remove_stale(path: &Path) -> Result<()> {
    let name = path.display();
    let failed = |error: io::Error| Failure::running(format!("{name}: {error}"));
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
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_is_its_owners_and_goes_with_the_server() {
        let path = std::env::temp_dir().join(format!("engine-socket-{}", std::process::id()));
        let found = unix(&path, Access::Owner).unwrap();
        assert!(!path.exists());
        let runtime = crate::serve::runtime().unwrap();
        let _context = runtime.enter();
        let listening = found.listen().unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let taken = unix(&path, Access::Owner).unwrap_err().to_string();
        assert_eq!(taken, format!("{}: another process listens on it", path.display()));
        drop(listening);
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

    #[test]
    fn an_address_is_held_and_nobody_connects_before_it_listens() {
        let runtime = crate::serve::runtime().unwrap();
        let _context = runtime.enter();
        let socket = tcp("test", "127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let in_use = |address| {
            let why = tcp("test", address).unwrap_err().to_string();
            assert!(why.starts_with("test: Address already in use"), "{why}");
        };
        in_use(address);
        let _listening = Socket::Tcp(socket).listen().unwrap();
        TcpStream::connect(address).unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        in_use(taken.local_addr().unwrap());
    }
}
