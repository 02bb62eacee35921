//! What the CPU keeps where in an XSAVE area (Intel SDM vol. 1 ch. 13, cpuid leaf 0xd).

/// One component of the extended state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its bit in xstate_bv and XCR0.
    pub bit: u32,
    /// Where it lies in the standard format.
    pub offset: usize,
    /// Its size; 0 when this CPU does not have it.
    pub size: usize,
}

/// Offset and size of component `bit` on this CPU.
pub fn component(bit: u32) -> Component {
    use std::sync::OnceLock;
    static LEAF: OnceLock<[(u32, u32); 32]> = OnceLock::new();
    let leaf = LEAF.get_or_init(|| {
        std::array::from_fn(|i| {
            // CPUs since 2008 have leaf 0xd; one without says zero sizes
            #[allow(unused_unsafe)]
            // SAFETY: every x86-64 CPU has the cpuid instruction.
            let r = unsafe { std::arch::x86_64::__cpuid_count(0xd, i as u32) };
            if i < 2 {
                (0, 0)
            } else {
                (r.ebx, r.eax)
            }
        })
    });
    let (offset, size) = leaf.get(bit as usize).copied().unwrap_or((0, 0));
    Component { bit, offset: offset as usize, size: size as usize }
}

/// What the cpuid instruction says: eax, ebx, ecx, edx.
pub fn leaf(number: u32, part: u32) -> [u32; 4] {
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 CPU has the cpuid instruction.
    let r = unsafe { std::arch::x86_64::__cpuid_count(number, part) };
    [r.eax, r.ebx, r.ecx, r.edx]
}
