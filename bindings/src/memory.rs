//! Reading and writing the caller's memory, each pointer checked for what can be checked.
//!
//! What cannot be checked is a caller's promise (`# Safety`): that a pointer which is not NULL and is aligned
//! points to as much as was said, and that nobody else writes there during the call.

use std::ffi::c_char;

use crate::abi::Versioned;
use crate::ffi::{ENGINE_ERR_BUFFER, ENGINE_ERR_REQUEST, Fault};

/// Checks that `len` elements can be at `at`.
fn check<T>(name: &str, at: *const T, len: usize) -> Result<(), Fault> {
    if at.is_null() {
        return Err(Fault::argument(format!("{name} is NULL")));
    }
    if !at.is_aligned() {
        return Err(Fault::argument(format!("{name} is not aligned")));
    }
    match len.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Fault::argument(format!("{name} has {len} elements, more than memory holds"))),
    }
}

/// The caller's array.
///
/// # Safety
/// `at` is NULL or points to `len` elements that stay as they are while the result is used.
pub(crate) unsafe fn array<'a, T>(name: &str, at: *const T, len: usize) -> Result<&'a [T], Fault> {
    if len == 0 {
        return Ok(&[]);
    }
    check(name, at, len)?;
    // SAFETY: checked above as far as it goes; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(at, len) })
}

/// The caller's text.
///
/// # Safety
/// As [`array()`].
pub(crate) unsafe fn text<'a>(name: &str, at: *const c_char, len: usize) -> Result<&'a str, Fault> {
    // SAFETY: handed on from the caller.
    let bytes = unsafe { array(name, at.cast::<u8>(), len) }?;
    std::str::from_utf8(bytes).map_err(|e| Fault::argument(format!("{name}: {e}")))
}

/// C's token ids as the engine's.
pub(crate) fn token_ids(name: &str, ids: &[i32]) -> Result<Vec<u32>, Fault> {
    let id = |id: &i32| {
        let negative =
            |_| Fault::new(ENGINE_ERR_REQUEST, format!("{name} has token {id}, limit is 0"));
        u32::try_from(*id).map_err(negative)
    };
    ids.iter().map(id).collect()
}

/// Writes one value.
///
/// # Safety
/// `at` is NULL or writable.
pub(crate) unsafe fn write<T>(name: &str, at: *mut T, value: T) -> Result<(), Fault> {
    check(name, at, 1)?;
    // SAFETY: checked above as far as it goes; the rest is the caller's promise.
    unsafe { at.write(value) };
    Ok(())
}

/// The second half of the two-call pattern: reports how many values there are and, unless only that was asked
/// (no buffer), writes them.
///
/// # Safety
/// The buffer is NULL or has room for its capacity; `count` is NULL or writable.
pub(crate) unsafe fn fill<T: Copy>(
    values: &[T],
    (buffer, capacity): (*mut T, usize),
    count: *mut usize,
) -> Result<(), Fault> {
    // SAFETY: handed on from the caller.
    unsafe { write("count", count, values.len()) }?;
    if buffer.is_null() && capacity == 0 {
        return Ok(());
    }
    enough(values.len(), capacity)?;
    check("buffer", buffer, capacity)?;
    // SAFETY: the buffer has room for `capacity`, which is enough; it is no memory of ours.
    unsafe { buffer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    Ok(())
}

/// Checks that a buffer has room.
pub(crate) fn enough(needed: usize, capacity: usize) -> Result<(), Fault> {
    if needed <= capacity {
        return Ok(());
    }
    let message = format!("buffer has room for {capacity} elements, {needed} are needed");
    Err(Fault::new(ENGINE_ERR_BUFFER, message))
}

/// A buffer that is written one by one. It may be looked at, and its memory be shared, in between.
pub(crate) struct Buffer<T> {
    at: *mut T,
    capacity: usize,
}

impl<T> Buffer<T> {
    /// No buffer, for NULL, or one of `capacity`.
    ///
    /// # Safety
    /// `at` is NULL or has room for `capacity` until the buffer is dropped.
    pub(crate) unsafe fn new(
        name: &str,
        at: *mut T,
        capacity: usize,
    ) -> Result<Option<Self>, Fault> {
        if at.is_null() {
            return Ok(None);
        }
        check(name, at, capacity)?;
        Ok(Some(Self { at, capacity }))
    }

    /// Writes one element; beyond the capacity nothing.
    pub(crate) fn set(&mut self, index: usize, value: T) {
        if index < self.capacity {
            // SAFETY: within the capacity, which `new` was promised.
            unsafe { self.at.wrapping_add(index).write(value) };
        }
    }
}

/// Reads a struct of whatever version the caller knows; NULL is the default.
///
/// # Safety
/// `at` is NULL or points to as many bytes as its `struct_size` says.
pub(crate) unsafe fn read<T: Versioned>(at: *const T) -> Result<T, Fault> {
    let mut value = T::default();
    if at.is_null() {
        return Ok(value);
    }
    check(T::NAME, at, 1)?;
    // SAFETY: every version begins with its size.
    let struct_size = unsafe { at.cast::<u32>().read() } as usize;
    let known = check_size::<T>(struct_size)?;
    let to = (&raw mut value).cast::<u8>();
    // SAFETY: both have `known` bytes; whole fields of a struct for which all bits are values.
    unsafe { to.copy_from_nonoverlapping(at.cast(), known) };
    Ok(value)
}

/// Writes back a struct that [`read`] returned: as much of it as the caller knows.
///
/// # Safety
/// `at` is where `value` was read from, and still valid.
pub(crate) unsafe fn write_back<T: Versioned>(at: *mut T, value: &T) {
    let known = (value.struct_size() as usize).min(size_of::<T>());
    // SAFETY: `read` has checked that both have `known` bytes.
    unsafe { at.cast::<u8>().copy_from_nonoverlapping((&raw const *value).cast(), known) };
}

/// Writes the default of a struct of whatever version the caller knows; what the library does not know is 0.
///
/// # Safety
/// `at` is NULL or points to `struct_size` writable bytes.
pub(crate) unsafe fn write_default<T: Versioned>(
    at: *mut T,
    struct_size: usize,
) -> Result<(), Fault> {
    check(T::NAME, at, 1)?;
    let known = check_size::<T>(struct_size)?;
    let stored = u32::try_from(struct_size).map_err(|_| wrong_size::<T>(struct_size))?;
    let value = T::default();
    // SAFETY: `at` has `struct_size` bytes.
    unsafe { at.cast::<u8>().write_bytes(0, struct_size) };
    // SAFETY: both have `known` bytes.
    unsafe { at.cast::<u8>().copy_from_nonoverlapping((&raw const value).cast(), known) };
    // SAFETY: every version begins with its size.
    unsafe { at.cast::<u32>().write(stored) };
    Ok(())
}

/// How many bytes of a struct of this size are known here: all, or those of some whole fields.
fn check_size<T: Versioned>(struct_size: usize) -> Result<usize, Fault> {
    let whole = struct_size >= size_of::<T>();
    if whole || T::FIELDS.iter().any(|(_, offset)| *offset == struct_size && *offset > 0) {
        return Ok(struct_size.min(size_of::<T>()));
    }
    Err(wrong_size::<T>(struct_size))
}

fn wrong_size<T: Versioned>(struct_size: usize) -> Fault {
    let (name, own) = (T::NAME, size_of::<T>());
    Fault::argument(format!("{name}.struct_size is {struct_size}, this version's is {own}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Config;

    #[test]
    fn a_short_tail_has_defaults_and_an_unknown_one_is_left_alone() {
        let default = Config::default();
        let mut config = Config { max_num_seqs: 3, block_size: 999, ..default };
        let short = Config::FIELDS.iter().find(|(name, _)| *name == "block_size").unwrap().1;
        config.struct_size = short.try_into().unwrap();
        // SAFETY: the struct is larger than its size says.
        let read_back = unsafe { read(&config) }.unwrap();
        assert_eq!((read_back.max_num_seqs, read_back.block_size), (3, default.block_size));

        let mut newer = [(config, 7u64)];
        newer[0].0.struct_size = (size_of::<Config>() + 8).try_into().unwrap();
        // SAFETY: a tail follows the struct.
        let read_back = unsafe { read((&raw const newer).cast::<Config>()) }.unwrap();
        assert_eq!((read_back.block_size, newer[0].1), (999, 7));
    }

    #[test]
    fn a_size_that_cuts_a_field_is_refused() {
        for size in [0, 1, 3, 5, 33] {
            let config = Config { struct_size: size, ..Config::default() };
            // SAFETY: the struct is larger than its size says.
            assert!(unsafe { read(&config) }.is_err(), "{size}");
        }
    }

    #[test]
    fn defaults_fill_exactly_the_callers_struct() {
        let mut bytes = [0xAAAA_AAAA_AAAA_AAAAu64; 10];
        let size = size_of::<Config>() + 8;
        // SAFETY: 80 bytes, of which 72 are said to be the struct.
        unsafe { write_default(bytes.as_mut_ptr().cast::<Config>(), size) }.unwrap();
        assert_eq!((bytes[0] as u32, bytes[8], bytes[9]), (72, 0, 0xAAAA_AAAA_AAAA_AAAA));
        // SAFETY: as above.
        unsafe { write_default(bytes.as_mut_ptr().cast::<Config>(), 4) }.unwrap();
        assert_eq!(bytes[0] as u32, 4);
    }
}
