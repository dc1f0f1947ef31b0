//! Memory of the product's operands: 64-byte lines of sixteen 32-bit words, aligned, zeroed, grow-only.
//!
//! A word is one f32 or two bf16 (the lower half is the one with the smaller index), so that both
//! formats share every address calculation. Leaves out shrinking and any notion of shape.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Words in a [`Line`], which is also the number of weight rows in a block.
pub(crate) const WORDS: usize = 16;

/// From this size on huge pages are asked for.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// One cache line, one 512-bit register, one row of an AMX tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; WORDS]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; WORDS]);
}

/// An owned, aligned, initialised array of lines.
pub(crate) struct Buffer {
    start: NonNull<Line>,
    len: usize,
}

// SAFETY: the buffer owns its memory and hands it out only as slices under the borrow rules.
unsafe impl Send for Buffer {}
// SAFETY: as above; a shared buffer can only be read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` lines of zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::dangling(), len };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is not of size 0.
        let memory = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(memory.cast::<Line>()) else { handle_alloc_error(layout) };
        if layout.size() >= HUGE_PAGE_BYTES {
            ask_for_huge_pages(memory as usize, layout.size());
        }
        // SAFETY: the memory is `len` lines long; all-zero is a valid line.
        unsafe { start.write_bytes(0, len) };
        Self { start, len }
    }

    /// Makes room for `len` lines; what was written before is lost when it has to grow.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeros(0);
            *self = Self::zeros(len);
        }
    }

    /// Large buffers start at a huge page, so that all of them can be made of such pages.
    fn layout(len: usize) -> Layout {
        let layout =
            Layout::array::<Line>(len).expect("a buffer is smaller than the address space");
        let align = if layout.size() >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { layout.align() };
        layout.align_to(align).expect("a buffer is smaller than the address space")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated by `zeros` with the same layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

impl Deref for Buffer {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: `len` initialised lines (or none at a dangling, aligned pointer), borrowed with self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as in `deref`, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Advises the system to back `bytes` from `address` by huge pages; a refusal changes nothing.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn ask_for_huge_pages(address: usize, bytes: usize) {
    const MADVISE: usize = 28;
    const MADV_HUGEPAGE: usize = 14;
    // SAFETY: advice about memory that the caller owns; its content is not touched.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") MADVISE => _,
            in("rdi") address,
            in("rsi") bytes,
            in("rdx") MADV_HUGEPAGE,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn ask_for_huge_pages(_address: usize, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_growable() {
        for len in [0, 1, 33, 40_000] {
            let mut buffer = Buffer::zeros(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % 64, 0);
            assert!(buffer.iter().all(|line| *line == Line::ZERO));
            if let Some(last) = buffer.last_mut() {
                last.0[15] = 7;
            }
            buffer.reserve(len / 2);
            assert_eq!(buffer.len(), len);
            buffer.reserve(len + 1);
            assert!(buffer.len() == len + 1 && buffer.iter().all(|line| *line == Line::ZERO));
        }
    }
}
