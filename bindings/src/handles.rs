//! The open engines. A handle is a name in a table, never an address, so one that was freed or made up is
//! found out instead of followed; names are not used twice.

use std::collections::BTreeMap;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::Service;

use crate::ffi::{ENGINE_ERR_HANDLE, Fault};

/// What `engine *` of the header points to: nothing.
#[derive(Debug)]
pub enum Handle {}

struct Table {
    open: BTreeMap<usize, Arc<Service>>,
    last: usize,
}

static TABLE: Mutex<Table> = Mutex::new(Table { open: BTreeMap::new(), last: 0 });

/// The process that opened the first engine; 0 before.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Fails in a process that was forked from one with engines: their threads are not there, and whoever waits for
/// them, or for a lock that one of them held, waits for ever. Looked at before any lock.
pub(crate) fn check_process() -> Result<(), Fault> {
    let own = process::id();
    match OWNER.load(Ordering::Relaxed) {
        0 => Ok(()),
        owner if owner == own => Ok(()),
        owner => {
            let why = format!("engines were opened by process {owner}, this is process {own}");
            Err(Fault::new(ENGINE_ERR_HANDLE, why))
        }
    }
}

fn table() -> MutexGuard<'static, Table> {
    // No operation on the table leaves it half done.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes in an engine and names it.
pub(crate) fn insert(service: Service) -> *mut Handle {
    OWNER.store(process::id(), Ordering::Relaxed);
    let mut table = table();
    table.last += 1;
    let name = table.last;
    table.open.insert(name, Arc::new(service));
    std::ptr::without_provenance_mut(name)
}

/// The engine of this name, for the length of a call.
pub(crate) fn get(handle: *const Handle) -> Result<Arc<Service>, Fault> {
    check_process()?;
    let found = table().open.get(&handle.addr()).cloned();
    found.ok_or_else(|| unknown(handle))
}

/// Forgets a name. The engine ends with its last call.
pub(crate) fn remove(handle: *const Handle) -> Result<Arc<Service>, Fault> {
    check_process()?;
    let removed = table().open.remove(&handle.addr());
    removed.ok_or_else(|| unknown(handle))
}

fn unknown(handle: *const Handle) -> Fault {
    let message = match handle.is_null() {
        true => "the engine is NULL".to_owned(),
        false => format!("no engine {} is open", handle.addr()),
    };
    Fault::new(ENGINE_ERR_HANDLE, message)
}
