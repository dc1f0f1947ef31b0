//! The open engines. A handle is a name in a table, never an address, so one that was freed or made up is
//! found out instead of followed; names are not used twice.

use std::collections::BTreeMap;
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

fn table() -> MutexGuard<'static, Table> {
    // No operation on the table leaves it half done.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes in an engine and names it.
pub(crate) fn insert(service: Service) -> *mut Handle {
    let mut table = table();
    table.last += 1;
    let name = table.last;
    table.open.insert(name, Arc::new(service));
    std::ptr::without_provenance_mut(name)
}

/// The engine of this name, for the length of a call.
pub(crate) fn get(handle: *const Handle) -> Result<Arc<Service>, Fault> {
    let found = table().open.get(&handle.addr()).cloned();
    found.ok_or_else(|| unknown(handle))
}

/// Forgets a name. The engine ends with its last call.
pub(crate) fn remove(handle: *const Handle) -> Result<Arc<Service>, Fault> {
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
