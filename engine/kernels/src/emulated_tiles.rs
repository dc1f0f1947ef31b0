//! AMX tiles on a processor without them, so that what runs on tiles can be tested there: slowly, and to the bit.
//!
//! Every tile instruction raises `SIGILL` on such a processor. The handler here decodes it, does to tiles of its own
//! what the processor would have done, and goes on behind it. Semantics: Intel's Software Developer's Manual, volume 2,
//! `LDTILECFG`, `TILELOADD`, `TILESTORED`, `TILEZERO`, `TILERELEASE`, `TDPBF16PS`. What a processor refuses ends the
//! process here with a line that says why. Leaves out every other tile instruction, and loads that start again behind
//! a page fault: the handler is not interrupted.

use std::cell::UnsafeCell;
use std::sync::OnceLock;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, Register};

/// Bytes of a tile's row, rows of a tile, tiles of palette 1.
const ROW: usize = 64;
const ROWS: usize = 16;
const TILES: usize = 8;
/// f32 of a row.
const WORDS: usize = ROW / 4;
/// The longest instruction in bytes.
const LONGEST: usize = 15;

/// One tile; what its shape leaves out is zero.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    data: [[u32; WORDS]; ROWS],
}

impl Tile {
    const NONE: Self = Self { rows: 0, row_bytes: 0, data: [[0; WORDS]; ROWS] };
}

thread_local! {
    /// The tiles of this thread; only its handler reads and writes them.
    static TILES_HERE: UnsafeCell<[Tile; TILES]> = const { UnsafeCell::new([Tile::NONE; TILES]) };
}

/// Answers tile instructions of this process from now on; true where that can be done.
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // The decoder makes its tables when it is first used, and a handler must not allocate.
        let _ = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        // SAFETY: all zeros are a valid `sigaction`: no flags, an empty mask, and the stack of whoever was interrupted.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = on_illegal as *const () as usize;
        // SAFETY: the action is whole, and its handler has the signature that `SA_SIGINFO` asks for.
        let status =
            unsafe { libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) };
        status == 0
    })
}

/// Does what the instruction at the place of the signal says, and goes on behind it.
extern "C" fn on_illegal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes a context, which is this handler's alone until it returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize];
    // SAFETY: the processor has just read an instruction there, and code that is followed by fewer than 15 bytes of
    // its page and then by nothing is not what a linker makes.
    let code = unsafe { std::slice::from_raw_parts(at as *const u8, LONGEST) };
    let instruction = Decoder::with_ip(64, code, at as u64, DecoderOptions::NONE).decode();
    let value = |register| value(registers, register);
    let done = TILES_HERE.with(|tiles| {
        // SAFETY: handlers of one thread do not interrupt each other (`SIGILL` is blocked within its handler), and
        // nobody else knows these tiles.
        let tiles = unsafe { &mut *tiles.get() };
        // SAFETY: what the instruction reads and writes is what the code that holds it answers for.
        unsafe { execute(&instruction, tiles, value) }
    });
    if let Err(why) = done {
        eprintln!("illegal instruction at {at:#x}: {:?}: {why}", instruction.code());
        std::process::abort();
    }
    registers[libc::REG_RIP as usize] += instruction.len() as i64;
}

/// The value of a general register; zero for none.
fn value(registers: &[libc::greg_t], register: Register) -> usize {
    use libc::{
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP,
        REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP,
    };
    let index = match register {
        Register::RAX => REG_RAX,
        Register::RBX => REG_RBX,
        Register::RCX => REG_RCX,
        Register::RDX => REG_RDX,
        Register::RSI => REG_RSI,
        Register::RDI => REG_RDI,
        Register::RBP => REG_RBP,
        Register::RSP => REG_RSP,
        Register::R8 => REG_R8,
        Register::R9 => REG_R9,
        Register::R10 => REG_R10,
        Register::R11 => REG_R11,
        Register::R12 => REG_R12,
        Register::R13 => REG_R13,
        Register::R14 => REG_R14,
        Register::R15 => REG_R15,
        _ => return 0,
    };
    registers[index as usize] as usize
}

/// Does what the instruction says; `Err` says what a processor would have refused.
///
/// # Safety
/// The memory that the instruction names may be read or written by it.
unsafe fn execute(
    instruction: &Instruction,
    tiles: &mut [Tile; TILES],
    value: impl Fn(Register) -> usize,
) -> Result<(), &'static str> {
    let tile = |operand| tile_of(instruction, operand);
    // Where the memory operand begins, and for tiles how far apart its rows lie.
    let address =
        value(instruction.memory_base()).wrapping_add(instruction.memory_displacement64() as usize);
    let stride =
        value(instruction.memory_index()).wrapping_mul(instruction.memory_index_scale() as usize);
    let row = |m: usize| address.wrapping_add(m.wrapping_mul(stride));
    match instruction.mnemonic() {
        // SAFETY: promised: 64 bytes.
        Mnemonic::Ldtilecfg => *tiles = unsafe { configured(address as *const [u8; 64])? },
        Mnemonic::Tilerelease => *tiles = [Tile::NONE; TILES],
        Mnemonic::Tilezero => held(&mut tiles[tile(0)?])?.data = Tile::NONE.data,
        Mnemonic::Tileloadd | Mnemonic::Tileloaddt1 => {
            let to = held(&mut tiles[tile(0)?])?;
            to.data = Tile::NONE.data;
            for (m, data) in to.data[..to.rows].iter_mut().enumerate() {
                // SAFETY: promised for this row; a row of a tile holds 64 bytes, and shapes are no larger.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        row(m) as *const u8,
                        data.as_mut_ptr().cast(),
                        to.row_bytes,
                    );
                }
            }
        }
        Mnemonic::Tilestored => {
            let from = held(&mut tiles[tile(1)?])?;
            for (m, data) in from.data[..from.rows].iter().enumerate() {
                // SAFETY: as for loads.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        data.as_ptr().cast(),
                        row(m) as *mut u8,
                        from.row_bytes,
                    );
                }
            }
        }
        Mnemonic::Tdpbf16ps => {
            let numbers = [tile(0)?, tile(1)?, tile(2)?];
            let [mut sums, left, right] = numbers.map(|tile| tiles[tile]);
            held(&mut sums)?;
            if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
                return Err("a tile named twice");
            }
            let pairs = left.row_bytes / 4;
            if (sums.rows, sums.row_bytes, pairs) != (left.rows, right.row_bytes, right.rows) {
                return Err("tiles whose shapes do not fit");
            }
            // SAFETY: whoever installed this has found AVX-512 before.
            unsafe { add_products(&mut sums, &left, &right) };
            tiles[numbers[0]] = sums;
        }
        _ => return Err("not a tile instruction that is emulated here"),
    }
    Ok(())
}

/// The number of the tile that this operand names.
fn tile_of(instruction: &Instruction, operand: u32) -> Result<usize, &'static str> {
    let first = Register::TMM0 as usize;
    let number = (instruction.op_register(operand) as usize).checked_sub(first);
    number.filter(|&tile| tile < TILES).ok_or("an operand that is no tile")
}

/// The tile, if the configuration gave it a shape.
fn held(tile: &mut Tile) -> Result<&mut Tile, &'static str> {
    if tile.rows > 0 { Ok(tile) } else { Err("a tile without a shape") }
}

/// Tiles of zeros in the shapes of a configuration: palette, bytes per row from byte 16 on, rows from byte 48 on.
///
/// # Safety
/// The configuration may be read.
unsafe fn configured(from: *const [u8; 64]) -> Result<[Tile; TILES], &'static str> {
    // SAFETY: promised.
    let bytes = unsafe { from.read() };
    let mut tiles = [Tile::NONE; TILES];
    let rest = [&bytes[1..16], &bytes[32..48], &bytes[56..]];
    if bytes[0] > 1 || rest.iter().any(|rest| rest.iter().any(|&byte| byte != 0)) {
        return Err("a palette above 1, a start row, or a ninth tile");
    }
    if bytes[0] == 0 {
        return Ok(tiles);
    }
    for (i, tile) in tiles.iter_mut().enumerate() {
        let row_bytes = usize::from(u16::from_le_bytes([bytes[16 + 2 * i], bytes[17 + 2 * i]]));
        let rows = usize::from(bytes[48 + i]);
        if rows > ROWS || row_bytes > ROW || row_bytes % 4 != 0 || (rows == 0) != (row_bytes == 0) {
            return Err("a shape beyond 16 rows of 64 bytes, or of part of a word");
        }
        *tile = Tile { rows, row_bytes, ..Tile::NONE };
    }
    Ok(tiles)
}

/// `sums[m][n] += (sum over k of left[m][k].0 right[k][n].0) + (sum over k of left[m][k].1 right[k][n].1)`, with pairs
/// of bf16 in each word: both sums by fused multiply-adds in ascending order from zero; denormals are zero throughout.
///
/// # Safety
/// The processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
fn add_products(sums: &mut Tile, left: &Tile, right: &Tile) {
    /// Rounds to nearest, raises nothing, and takes denormals for zeros on both sides.
    const FLUSH: u32 = 0x9fc0;
    let (mut sums, mut left, mut right): (*mut Tile, *const Tile, *const Tile) =
        (sums, left, right);
    // SAFETY: sets how this thread's floating point rounds until its handler returns, when the system puts back what was.
    // Tiles pass through, so that nothing is multiplied before.
    unsafe {
        std::arch::asm!(
            "ldmxcsr [{}]", in(reg) &FLUSH, inout("rax") sums, inout("rcx") left, inout("rdx") right,
            options(nostack),
        );
    }
    // SAFETY: it is where it was.
    let sums = unsafe { &mut *sums };
    // SAFETY: as above.
    let left = unsafe { &*left };
    // SAFETY: as above.
    let right = unsafe { &*right };
    let halves = |word: u32| [word << 16, word & 0xffff_0000].map(f32::from_bits);
    for (sums, left) in sums.data[..sums.rows].iter_mut().zip(&left.data) {
        let mut parts = [[0f32; WORDS]; 2];
        for (word, right) in left.iter().zip(&right.data[..right.rows]) {
            let left = halves(*word);
            for n in 0..WORDS {
                let right = halves(right[n]);
                parts[0][n] = left[0].mul_add(right[0], parts[0][n]);
                parts[1][n] = left[1].mul_add(right[1], parts[1][n]);
            }
        }
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = (f32::from_bits(*sum) + (parts[0][n] + parts[1][n])).to_bits();
        }
    }
}
