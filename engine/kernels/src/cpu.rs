//! Which processor features exist here, proven by values.
//!
//! A fast kernel can only be called by somebody who holds the token that its check returned, so a
//! machine without the feature never meets the instruction. Nothing here reads the environment.

use std::fmt;

/// A family of kernels, from the plainest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The naive definition of every operation; one thread, plain loops.
    Reference,
    /// Blocked and threaded, but no instruction beyond the baseline processor.
    Portable,
    /// AVX2 with fused multiply-adds and conversions of f16.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL), with its dot products of bf16 and of integers where the processor has them.
    Avx512,
    /// AVX-512 plus AMX tiles for bf16 products.
    Amx,
}

impl Level {
    /// All levels, slowest first.
    pub const ALL: [Self; 5] =
        [Self::Reference, Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The name used by `ENGINE_CPU`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// The level of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// The best level this processor and system can run.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.isa().is_some()).unwrap_or(Self::Portable)
    }

    /// Whether this processor can run it.
    pub fn available(self) -> bool {
        self.isa().is_some()
    }

    /// The proof that this level runs here.
    pub(crate) fn isa(self) -> Option<Isa> {
        match self {
            Self::Reference => Some(Isa::Reference),
            Self::Portable => Some(Isa::Portable),
            Self::Avx2 => Avx2::new().map(Isa::Avx2),
            Self::Avx512 => Avx512::new().map(Isa::Avx512),
            Self::Amx => Amx::new().map(Isa::Amx),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A level together with the proof that it runs here.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    Reference,
    Portable,
    Avx2(Avx2),
    Avx512(Avx512),
    Amx(Amx),
}

impl Isa {
    /// AVX2 where it is what the level uses: at the level `avx2` only.
    pub(crate) fn avx2(self) -> Option<Avx2> {
        match self {
            Self::Avx2(token) => Some(token),
            Self::Reference | Self::Portable | Self::Avx512(_) | Self::Amx(_) => None,
        }
    }

    /// AVX-512 where it may be used: at the levels `avx512` and `amx`.
    pub(crate) fn avx512(self) -> Option<Avx512> {
        match self {
            Self::Reference | Self::Portable | Self::Avx2(_) => None,
            Self::Avx512(token) => Some(token),
            Self::Amx(token) => Some(token.avx512),
        }
    }
}

/// Proof that AVX2, FMA and F16C may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let found = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            found.then_some(Self(()))
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// Proof that AVX-512 F, BW, DQ and VL (and AVX2, FMA and F16C) may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    avx2: Avx2,
    bf16: bool,
    vnni: bool,
}

impl Avx512 {
    fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = Avx2::new()?;
            let base = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            base.then(|| Self {
                avx2,
                bf16: is_x86_feature_detected!("avx512bf16"),
                vnni: is_x86_feature_detected!("avx512vnni"),
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// The same processor as if it had no dot products, to test what is done then.
    #[cfg(test)]
    pub(crate) fn without_dots(self) -> Self {
        Self { bf16: false, vnni: false, ..self }
    }

    /// Proof that AVX2 may be used too.
    pub(crate) fn avx2(self) -> Avx2 {
        self.avx2
    }

    /// Proof that the AVX-512 bf16 dot product may be used too.
    pub(crate) fn bf16(self) -> Option<Avx512Bf16> {
        self.bf16.then_some(Avx512Bf16(()))
    }

    /// Proof that the AVX-512 dot product of 16-bit integers may be used too.
    pub(crate) fn vnni(self) -> Option<Avx512Vnni> {
        self.vnni.then_some(Avx512Vnni(()))
    }
}

/// Proof that AVX512_BF16 (`vdpbf16ps`) may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(());

/// Proof that AVX512_VNNI (`vpdpwssd`) may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vnni(());

/// Proof that AMX tiles with bf16 products may be used by this process, and AVX512_BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx {
    pub(crate) avx512: Avx512,
    pub(crate) bf16: Avx512Bf16,
}

impl Amx {
    /// The processor has tiles and bf16 products, the system saves them, and it gave permission.
    pub(crate) fn new() -> Option<Self> {
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        {
            let avx512 = Avx512::new()?;
            let bf16 = avx512.bf16()?;
            let there = amx::in_hardware() && amx::enabled() && amx::permitted();
            #[cfg(feature = "emulated-tiles")]
            let there = there || crate::emulated_tiles::install();
            there.then_some(Self { avx512, bf16 })
        }
        #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
        None
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// CPUID leaf 7, EDX: AMX-BF16 (bit 22) and AMX-TILE (bit 24).
    pub(super) fn in_hardware() -> bool {
        const NEEDED: u32 = 1 << 22 | 1 << 24;
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED
    }

    /// XCR0: the system saves tile configuration (bit 17) and tile data (bit 18).
    pub(super) fn enabled() -> bool {
        const NEEDED: u64 = 1 << 17 | 1 << 18;
        // SAFETY: AVX-512 was found usable before, so the system has enabled XGETBV.
        let enabled = unsafe { _xgetbv(0) };
        enabled & NEEDED == NEEDED
    }

    /// Asks the system to let this process (all its threads) use tile data.
    pub(super) fn permitted() -> bool {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const TILE_DATA: usize = 18;
        let status: isize;
        // SAFETY: this system call grants a permission and touches no memory.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => status,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") TILE_DATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        status == 0
    }
}

/// The names of the processor features that kernels ask for and that were found.
pub fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    if Avx2::new().is_some() {
        found.extend(["avx2", "fma", "f16c"]);
    }
    if let Some(token) = Avx512::new() {
        found.extend(["avx512f", "avx512bw", "avx512dq", "avx512vl"]);
        if token.bf16().is_some() {
            found.push("avx512bf16");
        }
        if token.vnni().is_some() {
            found.push("avx512vnni");
        }
    }
    if Amx::new().is_some() {
        found.push("amx-bf16");
    }
    found
}
