//! What runs for the visitors, and the names by which a client can end a request that it has no connection to.
//!
//! A request answers to its `x-request-id` (the client's own, else the one the server made), to
//! `request_id` of its body and to the `id` of its answer. Names a client chooses may be shared by
//! several requests: all of them end. Names made here are 128 random bits, so nobody guesses another's.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{RequestId, Service};

use crate::access::{MAX_ID_BYTES, is_plain_name};
use crate::fields::BadField;

/// The requests that are being served.
#[derive(Debug, Default)]
pub(crate) struct Named {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    map: HashMap<u64, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    names: Vec<String>,
    requests: Vec<RequestId>,
    /// Set before the engine has it, too: then it ends as soon as the engine does.
    aborted: bool,
}

impl Entry {
    fn abort(&mut self, service: &Service) {
        self.aborted = true;
        self.requests.iter().for_each(|request| service.abort(*request));
    }
}

impl Named {
    /// A request without a name so far.
    pub(crate) fn enter(self: &Arc<Self>) -> Name {
        let mut entries = self.locked();
        let key = entries.next;
        entries.next += 1;
        entries.map.insert(key, Entry::default());
        Name { named: Arc::clone(self), key }
    }

    /// Ends the requests that have one of these names; returns the names that something had, each
    /// once, in the order they are given.
    pub(crate) fn abort(&self, service: &Service, names: &[String]) -> Vec<String> {
        let asked: HashSet<&str> = names.iter().map(String::as_str).collect();
        let mut found = HashSet::new();
        for entry in self.locked().map.values_mut() {
            let known = entry.names.iter().filter_map(|name| asked.get(name.as_str()));
            let known: Vec<&str> = known.copied().collect();
            if !known.is_empty() {
                entry.abort(service);
                found.extend(known);
            }
        }
        names.iter().filter(|name| found.remove(name.as_str())).cloned().collect()
    }

    /// Ends all requests, those that the engine has not got yet too.
    pub(crate) fn abort_all(&self, service: &Service) {
        self.locked().map.values_mut().for_each(|entry| entry.abort(service));
    }

    /// How many of the engine's requests are being served.
    pub(crate) fn running(&self) -> usize {
        self.locked().map.values().map(|entry| entry.requests.len()).sum()
    }

    fn locked(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names of one request, which go when it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Name {
    named: Arc<Named>,
    key: u64,
}

impl Name {
    /// Adds a name.
    pub(crate) fn also(&self, name: &str) {
        self.change(|entry| entry.names.push(name.to_owned()));
    }

    /// Adds the name that a body gives.
    ///
    /// # Errors
    /// When it is too long or not plain.
    pub(crate) fn given(&self, name: Option<String>) -> Result<(), BadField> {
        let Some(name) = name else { return Ok(()) };
        if !is_plain_name(&name) {
            let bytes = name.len();
            let message = format!(
                "request_id has {bytes} bytes, limit is 1 to {MAX_ID_BYTES}, of printable ASCII"
            );
            return Err(BadField::new("request_id", message));
        }
        self.also(&name);
        Ok(())
    }

    /// Says what runs under the names; ends it if that has been asked for already.
    pub(crate) fn runs(&self, service: &Service, requests: &[RequestId]) {
        self.change(|entry| {
            entry.requests.extend_from_slice(requests);
            if entry.aborted {
                requests.iter().for_each(|request| service.abort(*request));
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.named.locked().map.get_mut(&self.key) {
            change(entry);
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        self.named.locked().map.remove(&self.key);
    }
}
