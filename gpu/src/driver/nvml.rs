//! NVIDIA's management library: which GPUs there are, and who uses how much of their memory.
//!
//! Nothing of this needs a CUDA context, and a process that asks does not become a CUDA process. Where the library is missing, the
//! figures are, too. Source: NVML API reference.

use std::ffi::{c_char, c_uint, c_void, CStr};

use libloading::os::unix::Library;

use super::{open, symbol, Uuid};

const NAMES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];
const INSUFFICIENT_SIZE: c_uint = 7;
const NOT_AVAILABLE: u64 = u64::MAX;

type Device = *mut c_void;
type Plain = unsafe extern "C" fn() -> c_uint;
type Count = unsafe extern "C" fn(*mut c_uint) -> c_uint;
type Handle = unsafe extern "C" fn(c_uint, *mut Device) -> c_uint;
type Text = unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_uint;
type SystemText = unsafe extern "C" fn(*mut c_char, c_uint) -> c_uint;
type MemoryInfo = unsafe extern "C" fn(Device, *mut Memory) -> c_uint;
type Processes = unsafe extern "C" fn(Device, *mut c_uint, *mut Process) -> c_uint;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Process {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its chip.
    pub name: String,
    /// Its memory in bytes.
    pub total: u64,
    /// What is free of it.
    pub free: u64,
    /// Who computes on it.
    pub users: Vec<Use>,
}

/// A process that computes on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Which one, as the driver sees it.
    pub pid: i32,
    /// Bytes of the GPU's memory, if that is known.
    pub bytes: Option<u64>,
}

/// The management library.
#[derive(Debug, Clone, Copy)]
pub struct Management {
    library: &'static Library,
}

impl Management {
    /// Loads and starts it; nothing if it is not there.
    #[must_use]
    pub fn load() -> Option<Management> {
        let library = open(&NAMES).ok()?;
        let init: Plain = symbol(library, c"nvmlInit_v2")?;
        // SAFETY: no memory is involved.
        (unsafe { init() } == 0).then_some(Management { library })
    }

    /// The version of the driver.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let get: SystemText = symbol(self.library, c"nvmlSystemGetDriverVersion")?;
        // SAFETY: `text` passes a buffer and its size.
        text(|to, room| unsafe { get(to, room) })
    }

    /// All GPUs.
    #[must_use]
    pub fn gpus(&self) -> Option<Vec<Gpu>> {
        let count: Count = symbol(self.library, c"nvmlDeviceGetCount_v2")?;
        let handle: Handle = symbol(self.library, c"nvmlDeviceGetHandleByIndex_v2")?;
        let mut n = 0;
        // SAFETY: a place for one number.
        if unsafe { count(&raw mut n) } != 0 {
            return None;
        }
        let mut all = Vec::new();
        for i in 0..n {
            let mut device: Device = std::ptr::null_mut();
            // SAFETY: a place for one handle.
            if unsafe { handle(i, &raw mut device) } == 0 {
                all.push(self.gpu(device)?);
            }
        }
        Some(all)
    }

    fn gpu(&self, device: Device) -> Option<Gpu> {
        let uuid: Text = symbol(self.library, c"nvmlDeviceGetUUID")?;
        let name: Text = symbol(self.library, c"nvmlDeviceGetName")?;
        let memory: MemoryInfo = symbol(self.library, c"nvmlDeviceGetMemoryInfo")?;
        let mut info = Memory::default();
        // SAFETY: a place for the structure that the documentation has for this function; the handle is the library's.
        if unsafe { memory(device, &raw mut info) } != 0 {
            return None;
        }
        Some(Gpu {
            // SAFETY: `text` passes a buffer and its size; the handle is the library's.
            uuid: Uuid::parse(&text(|to, room| unsafe { uuid(device, to, room) })?)?,
            // SAFETY: as above.
            name: text(|to, room| unsafe { name(device, to, room) })?,
            total: info.total,
            free: info.free,
            users: self.users(device).unwrap_or_default(),
        })
    }

    fn users(&self, device: Device) -> Option<Vec<Use>> {
        let get: Processes = symbol(self.library, c"nvmlDeviceGetComputeRunningProcesses_v3")?;
        let mut found = vec![Process::default(); 64];
        loop {
            let mut n = c_uint::try_from(found.len()).ok()?;
            // SAFETY: room for as many of the function's structures as `n` says.
            match unsafe { get(device, &raw mut n, found.as_mut_ptr()) } {
                0 => {
                    found.truncate(usize::try_from(n).ok()?);
                    let of = |p: &Process| {
                        let bytes = (p.used != NOT_AVAILABLE).then_some(p.used);
                        Some(Use { pid: i32::try_from(p.pid).ok()?, bytes })
                    };
                    return Some(found.iter().filter_map(of).collect());
                }
                INSUFFICIENT_SIZE if found.len() < 1 << 16 => {
                    let room = found.len().saturating_mul(2).max(usize::try_from(n).ok()?.min(1 << 16));
                    found.resize(room, Process::default());
                }
                _ => return None,
            }
        }
    }
}

fn text(get: impl Fn(*mut c_char, c_uint) -> c_uint) -> Option<String> {
    let mut buffer = [0u8; 256];
    // one byte less: there is a zero at the end whatever was written
    if get(buffer.as_mut_ptr().cast(), 255) != 0 {
        return None;
    }
    CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok().map(str::to_owned)
}
