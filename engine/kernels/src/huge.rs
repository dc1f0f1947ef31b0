//! An allocator for processes that compute: lines for what kernels read, huge pages for what is large.
//!
//! ```text
//! below 4 KiB    the system's allocator, as asked for
//! below 2 MiB    the system's allocator, on a 64-byte line
//! from 2 MiB on  mapped by itself from a huge page on, zero until written, given back when freed
//! ```
//! A vector load or store of 64 bytes that does not begin on a line touches two, which halves the speed
//! of what only moves memory; and a product that goes over rows some kilobytes apart needs a page table
//! entry for each of them, unless pages are large. A binary asks for it with
//! `#[global_allocator] static ALLOCATOR: kernels::HugePages = kernels::HugePages;`; without it the
//! kernels compute the same, slower. Elsewhere than on Linux only the lines are kept. Leaves out reuse:
//! whoever needs large memory often keeps it.

use std::alloc::{GlobalAlloc, Layout, System};

/// From this size on memory begins on a 64-byte line.
const LINE_FROM: usize = 4 << 10;
const LINE: usize = 64;
/// From this size on memory is mapped by itself.
const MAP_FROM: usize = HUGE_PAGE;
/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// See the module's text; the type has no state.
///
/// ```
/// use std::alloc::{GlobalAlloc, Layout};
/// let layout = Layout::from_size_align(5 << 20, 4)?;
/// // SAFETY: the layout has a size; the memory is given back with the same layout.
/// unsafe {
///     let memory = kernels::HugePages.alloc_zeroed(layout);
///     assert_eq!((memory as usize % 64, memory.read()), (0, 0));
///     kernels::HugePages.dealloc(memory, layout);
/// }
/// # Ok::<(), std::alloc::LayoutError>(())
/// ```
pub struct HugePages;

/// What is asked of the system for `layout`.
fn on_a_line(layout: Layout) -> Layout {
    match layout.size() >= LINE_FROM && layout.align() < LINE {
        // Sizes at the limit of the address space have no such layout, and no memory either.
        true => Layout::from_size_align(layout.size(), LINE).unwrap_or(layout),
        false => layout,
    }
}

fn is_mapped(layout: Layout) -> bool {
    map::AVAILABLE && layout.size() >= MAP_FROM && layout.align() <= HUGE_PAGE
}

/// Advises the system to back `len` bytes of the caller's by huge pages; a refusal changes nothing.
pub(crate) fn ask_for_huge_pages(memory: *const u8, len: usize) {
    map::advise(memory, len);
}

// SAFETY: every block comes from the system or a mapping of its own, chosen by the layout alone, so that
// it goes back where it came from.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map::map(layout.size());
        }
        // SAFETY: the caller's promise: a layout that has a size.
        unsafe { System.alloc(on_a_line(layout)) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map::map(layout.size());
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(on_a_line(layout)) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if is_mapped(layout) {
            // SAFETY: mapped by `map` for this size, which the same layout chose.
            return unsafe { map::unmap(memory, layout.size()) };
        }
        // SAFETY: the layout that `alloc` asked for.
        unsafe { System.dealloc(memory, on_a_line(layout)) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: `size` is valid with this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let same = !is_mapped(layout) && !is_mapped(new);
        if same && on_a_line(layout).align() == on_a_line(new).align() {
            // SAFETY: both layouts are the system's, with one alignment.
            return unsafe { System.realloc(memory, on_a_line(layout), size) };
        }
        // SAFETY: the caller's promise: `size` is not 0.
        let to = unsafe { self.alloc(new) };
        if !to.is_null() {
            // SAFETY: both blocks are as long, and they are two.
            unsafe { memory.copy_to_nonoverlapping(to, layout.size().min(size)) };
            // SAFETY: the caller's block, not used any more.
            unsafe { self.dealloc(memory, layout) };
        }
        to
    }
}

#[cfg(all(target_os = "linux", target_pointer_width = "64", not(miri)))]
mod map {
    use super::HUGE_PAGE;
    use std::ffi::{c_int, c_long, c_void};

    pub(super) const AVAILABLE: bool = true;

    const PAGE: usize = 4096;
    const READ_WRITE: c_int = 3;
    const PRIVATE_ANONYMOUS: c_int = 0x22;
    const MADV_HUGEPAGE: c_int = 14;

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            len: usize,
            protection: c_int,
            flags: c_int,
            file: c_int,
            offset: c_long,
        ) -> *mut c_void;
        fn munmap(at: *mut c_void, len: usize) -> c_int;
        fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
    }

    /// Whole pages; of what takes many huge pages, whole huge ones, so that its end lies on one too.
    fn rounded(size: usize) -> usize {
        size.next_multiple_of(if size >= 8 * HUGE_PAGE { HUGE_PAGE } else { PAGE })
    }

    /// `size` zeros from a huge page on, or null.
    pub(super) fn map(size: usize) -> *mut u8 {
        let Some(len) = size.checked_add(2 * HUGE_PAGE).map(|_| rounded(size)) else {
            return std::ptr::null_mut();
        };
        // SAFETY: a new mapping, anywhere.
        let start = unsafe {
            mmap(std::ptr::null_mut(), len + HUGE_PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        };
        if start.addr() == usize::MAX {
            return std::ptr::null_mut();
        }
        let lead = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
        let memory = start.wrapping_byte_add(lead);
        for (at, len) in [(start, lead), (memory.wrapping_byte_add(len), HUGE_PAGE - lead)] {
            if len > 0 {
                // SAFETY: the mapping's ends, which nobody knows.
                unsafe { munmap(at, len) };
            }
        }
        advise(memory.cast(), len);
        memory.cast()
    }

    /// See [`super::ask_for_huge_pages`].
    pub(super) fn advise(memory: *const u8, len: usize) {
        // SAFETY: advice changes no content; the system refuses it for what is not mapped.
        let _refused = unsafe { madvise(memory.cast_mut().cast(), len, MADV_HUGEPAGE) };
    }

    /// # Safety
    /// `memory` came from [`map`] with this size and is not used any more.
    pub(super) unsafe fn unmap(memory: *mut u8, size: usize) {
        // SAFETY: promised by the caller.
        unsafe { munmap(memory.cast(), rounded(size)) };
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", not(miri))))]
mod map {
    pub(super) const AVAILABLE: bool = false;

    pub(super) fn map(_size: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) fn advise(_memory: *const u8, _len: usize) {}

    /// # Safety
    /// Never called.
    pub(super) unsafe fn unmap(_memory: *mut u8, _size: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 8] =
        [1, 100, LINE_FROM, 100_000, MAP_FROM - 1, MAP_FROM, 5_000_001, 40 << 20];

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 4).expect("a small alignment")
    }

    /// The bytes of a block, which nobody else uses.
    fn bytes<'a>(memory: *mut u8, size: usize) -> &'a mut [u8] {
        // SAFETY: a block of that size, written or zero; the tests look at it in one place at a time.
        unsafe { std::slice::from_raw_parts_mut(memory, size) }
    }

    fn zeroed(size: usize) -> *mut u8 {
        // SAFETY: the layout has a size.
        unsafe { HugePages.alloc_zeroed(layout(size)) }
    }

    fn free(memory: *mut u8, size: usize) {
        // SAFETY: allocated with this layout, and not used any more.
        unsafe { HugePages.dealloc(memory, layout(size)) };
    }

    #[test]
    fn memory_is_on_lines_zero_if_asked_and_can_be_written() {
        for size in SIZES {
            let memory = zeroed(size);
            assert!(size < LINE_FROM || memory.addr().is_multiple_of(LINE), "{size}");
            assert!(bytes(memory, size).iter().all(|&byte| byte == 0), "{size}");
            bytes(memory, size).fill(7);
            free(memory, size);
        }
    }

    #[test]
    fn what_was_there_survives_a_change_of_size() {
        for (from, to) in SIZES.into_iter().flat_map(|from| SIZES.map(|to| (from, to))) {
            let memory = zeroed(from);
            let pattern = |i: usize| (i % 251) as u8;
            bytes(memory, from).iter_mut().enumerate().for_each(|(i, byte)| *byte = pattern(i));
            // SAFETY: allocated with this layout; the new size is not 0.
            let moved = unsafe { HugePages.realloc(memory, layout(from), to) };
            let kept = &bytes(moved, to.min(from));
            assert!(kept.iter().enumerate().all(|(i, &byte)| byte == pattern(i)), "{from} to {to}");
            free(moved, to);
        }
    }

    #[test]
    fn more_than_there_is_is_refused() {
        let size = isize::MAX as usize - HUGE_PAGE;
        // SAFETY: nothing is given back, as nothing came.
        assert!(unsafe { HugePages.alloc(layout(size)) }.is_null());
    }
}
