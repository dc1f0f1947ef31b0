//! Memory of the product's operands: 64-byte lines of sixteen 32-bit words, aligned, zeroed, grow-only.
//!
//! A word is one f32 or two bf16 (the lower half is the one with the smaller index), so that both
//! formats share every address calculation. Leaves out shrinking and any notion of shape.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::huge::{HUGE_PAGE, ask_for_huge_pages};

/// Words in a [`Line`], which is also the number of weight rows in a block.
pub(crate) const WORDS: usize = 16;

/// One cache line, one 512-bit register, one row of an AMX tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; WORDS]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; WORDS]);
}

/// Sizes of buffers that share huge pages with others, and of the memory that they share.
const SHARED_BYTES: std::ops::RangeInclusive<usize> = 64 << 10..=16 << 20;
const SLAB_BYTES: usize = 64 << 20;

/// An owned, aligned, initialised array of lines.
pub(crate) struct Buffer {
    start: NonNull<Line>,
    len: usize,
    /// What the lines are part of, if they are not by themselves.
    slab: Option<Arc<Slab>>,
}

/// Memory on huge pages that is handed out from its beginning to its end, and freed when all of its
/// buffers are: for the weights of a model, which come and go together. One matrix after the other, even
/// of less than a huge page, is then read at the full speed of memory; of small pages each needs a walk
/// through the tables, two of them nested in a virtual machine.
struct Slab(NonNull<Line>);

/// The slab that is handed out at present, and how many of its lines are.
static OPEN: Mutex<Option<(Arc<Slab>, usize)>> = Mutex::new(None);

impl Slab {
    const LINES: usize = SLAB_BYTES / size_of::<Line>();

    /// `len` lines that nobody else has, with anything in them.
    fn take(len: usize) -> (NonNull<Line>, Arc<Self>) {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (slab, used) = match open.take() {
            Some((slab, used)) if used + len <= Self::LINES => (slab, used),
            _ => (Arc::new(Self(Buffer::allocate(Self::LINES))), 0),
        };
        // SAFETY: the slab has that many lines.
        let start = unsafe { slab.0.add(used) };
        *open = Some((Arc::clone(&slab), used + len));
        (start, slab)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout; no buffer has a part of it any more.
        unsafe { dealloc(self.0.as_ptr().cast(), Buffer::layout(Self::LINES)) };
    }
}

// SAFETY: a slab only frees memory; its parts are the buffers'.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

// SAFETY: the buffer owns its memory and hands it out only as slices under the borrow rules.
unsafe impl Send for Buffer {}
// SAFETY: as above; a shared buffer can only be read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` lines of zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let start = match len {
            0 => NonNull::dangling(),
            _ => Self::allocate(len),
        };
        // SAFETY: the memory is `len` lines long; all-zero is a valid line.
        unsafe { start.write_bytes(0, len) };
        Self { start, len, slab: None }
    }

    /// As [`Buffer::zeros`], for what is kept as long as others that are made at the same time.
    pub(crate) fn shared_zeros(len: usize) -> Self {
        if !SHARED_BYTES.contains(&(len * size_of::<Line>())) {
            return Self::zeros(len);
        }
        let (start, slab) = Slab::take(len);
        // SAFETY: as in `zeros`.
        unsafe { start.write_bytes(0, len) };
        Self { start, len, slab: Some(slab) }
    }

    /// `len` lines, at least one, with anything in them.
    fn allocate(len: usize) -> NonNull<Line> {
        let layout = Self::layout(len);
        // SAFETY: the layout is not of size 0.
        let memory = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(memory.cast::<Line>()) else { handle_alloc_error(layout) };
        if layout.size() >= HUGE_PAGE {
            ask_for_huge_pages(memory, layout.size());
        }
        start
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
        let align = if layout.size() >= HUGE_PAGE { HUGE_PAGE } else { layout.align() };
        layout.align_to(align).expect("a buffer is smaller than the address space")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 && self.slab.is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_share_memory_have_parts_of_their_own() {
        let lines = SHARED_BYTES.start() / size_of::<Line>();
        let mut buffers: Vec<Buffer> = (0..40).map(|i| Buffer::shared_zeros(lines + i)).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.slab.is_some() && buffer.iter().all(|line| *line == Line::ZERO));
            buffer.fill(Line([i as u32 + 1; WORDS]));
        }
        buffers.truncate(20);
        let more = Buffer::shared_zeros(lines);
        assert!(more.iter().all(|line| *line == Line::ZERO));
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|line| line.0 == [i as u32 + 1; WORDS]), "buffer {i}");
        }
        assert!(Buffer::shared_zeros(1).slab.is_none());
    }

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
