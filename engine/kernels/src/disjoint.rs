//! A slice that several tasks write at once, each its own part.

use std::marker::PhantomData;

/// Shares one `&mut [T]` between the tasks of a [`crate::ThreadPool::run`].
///
/// The borrow lasts as long as this value, so nobody else sees the slice meanwhile.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: only `part` gives access, and its contract keeps the parts apart; T crosses threads.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above; the pointer is as good on another thread.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements `from..to`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    ///
    /// # Panics
    /// When the range does not lie within the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, from: usize, to: usize) -> &mut [T] {
        assert!(from <= to && to <= self.len, "part {from}..{to} of {} elements", self.len);
        // SAFETY: within the slice by the assertion.
        let first = unsafe { self.start.add(from) };
        // SAFETY: within the slice by the assertion; unaliased by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(first, to - from) }
    }

    /// Where the elements `from..to` begin; whoever writes them must own them as in [`Self::part`].
    ///
    /// For parts that are not one slice, such as a column of a row-major array.
    ///
    /// # Panics
    /// When the range does not lie within the slice.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn pointer(&self, from: usize, to: usize) -> *mut T {
        assert!(from <= to && to <= self.len, "part {from}..{to} of {} elements", self.len);
        self.start.wrapping_add(from)
    }

    /// The address of an element, to be asked for; there need not be one.
    pub(crate) fn address(&self, element: usize) -> *const T {
        self.start.wrapping_add(element)
    }
}
