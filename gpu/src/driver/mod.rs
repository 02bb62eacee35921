//! NVIDIA's driver library, loaded when it is first needed: the checkpoint interface, and what it says of GPUs.
//!
//! Argument and state types are cudarc's. Its functions are not used: it has none of this interface, and its loader ends the
//! program where there is no library. Symbols are asked for by `cuGetProcAddress`, the newest version first, else by name.
//!
//! The interface is that of a process which asks about another one: `cuCheckpointProcessGetState` and `…GetRestoreThreadId` are
//! questions, which a frozen process can be asked about; `…Lock`, `…Checkpoint`, `…Restore` and `…Unlock` are done by a thread
//! of the process asked about, which must be able to run. Sources: CUDA Driver API, "CUDA Checkpointing"; the page of
//! NVIDIA/cuda-checkpoint. Custom storage (CUDA 13.4) is not used: device memory is staged in the memory of its process, which is
//! dumped as all memory is.
#![allow(unsafe_code)]

mod nvml;

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fmt;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{
    CUcheckpointCheckpointArgs, CUcheckpointGpuPair, CUcheckpointLockArgs, CUcheckpointRestoreArgs,
    CUcheckpointUnlockArgs, CUuuid,
};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

pub use nvml::{Gpu, Management, Use};

/// Names under which the library is there, the one that belongs to a driver first.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
/// CUDA versions whose symbols are asked for, the newest first: 13.4, 13.0 (GPU pairs), 12.8 (the first with all of this).
const VERSIONS: [c_int; 3] = [13_040, 13_000, 12_080];
const PAIRS_SINCE: c_int = 13_000;
/// How often a state is asked for.
const TURN: Duration = Duration::from_millis(2);
/// How long a process is watched of which somebody asked something who died.
const SETTLED: Duration = Duration::from_millis(100);
/// How many questions may be answered with the result of the one before, or meet another state than the one seen.
const ROUNDS: u32 = 16;

type Result<T, E = DriverError> = std::result::Result<T, E>;

/// A CUresult that is not success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its number.
    pub number: u32,
    /// Its name, as the driver has it.
    pub name: String,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.number)
    }
}

/// What a CUDA process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It makes CUDA calls.
    Running,
    /// Its CUDA calls wait.
    Locked,
    /// Its device memory is in its own memory, and it holds no GPU.
    Checkpointed,
    /// Between two of these; or what a newer driver has.
    Between(u32),
    /// The driver could not go on with it.
    Failed,
}

impl State {
    /// From the driver's number, or that of an image.
    #[must_use]
    pub fn of(number: u32) -> State {
        match number {
            0 => State::Running,
            1 => State::Locked,
            2 => State::Checkpointed,
            3 => State::Failed,
            other => State::Between(other),
        }
    }

    /// The driver's number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            State::Running => 0,
            State::Locked => 1,
            State::Checkpointed => 2,
            State::Failed => 3,
            State::Between(other) => other,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Running => f.write_str("running"),
            State::Locked => f.write_str("locked"),
            State::Checkpointed => f.write_str("checkpointed"),
            State::Failed => f.write_str("failed"),
            State::Between(number) => write!(f, "state {number}"),
        }
    }
}

/// A step from one state to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Running to locked.
    Lock,
    /// Locked to checkpointed.
    Checkpoint,
    /// Checkpointed to locked.
    Restore,
    /// Locked to running.
    Unlock,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Lock => "cuCheckpointProcessLock",
            Step::Checkpoint => "cuCheckpointProcessCheckpoint",
            Step::Restore => "cuCheckpointProcessRestore",
            Step::Unlock => "cuCheckpointProcessUnlock",
        })
    }
}

/// Why the driver did not do what it was asked for. A message says what can be done about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// There is no library.
    #[error("there is no NVIDIA driver: libcuda.so.1 cannot be loaded ({why}); install driver 570 or newer")]
    NoDriver {
        /// What the loader said.
        why: String,
    },
    /// It has no checkpoint interface.
    #[error(
        "the NVIDIA driver {driver}(CUDA {}.{}) cannot checkpoint: driver 570 (CUDA 12.8) or newer is needed",
        cuda / 1000, cuda % 1000 / 10
    )]
    TooOld {
        /// Its own version with a space behind it, or nothing if that is not known.
        driver: String,
        /// The CUDA version that it has.
        cuda: i32,
    },
    /// It does not start.
    #[error("the NVIDIA driver does not start: cuInit says {code}")]
    Init {
        /// What it said.
        code: Code,
    },
    /// GPUs cannot be chosen by this driver.
    #[error(
        "this NVIDIA driver cannot restore to another GPU: CUDA 13.0 (driver 580) or newer is needed for --gpu-map"
    )]
    NoPairs,
    /// The lock could not be had in time.
    #[error(
        "its CUDA work did not come to a point where it can be locked within {} ms; give it longer with --gpu-timeout",
        limit.as_millis()
    )]
    LockTimeout {
        /// The limit.
        limit: Duration,
    },
    /// What the process does with CUDA cannot be checkpointed.
    #[error(
        "{step} says {code}: this process uses what the driver cannot checkpoint (managed memory, memory shared by IPC, MPS or \
         MIG, as the driver's version has it)"
    )]
    Unsupported {
        /// The step.
        step: Step,
        /// What it said.
        code: Code,
    },
    /// There is not enough memory: of the device at a restore, of the host at a checkpoint.
    #[error("{step} says {code}: there is not enough memory {}", if *step == Step::Restore { "on the GPU" } else { "for what is on the GPU" })]
    NoMemory {
        /// The step.
        step: Step,
        /// What it said.
        code: Code,
    },
    /// The GPUs are not those of the checkpoint.
    #[error("{step} says {code}: the GPUs here do not match those of the checkpoint; say which takes whose place with --gpu-map")]
    Mismatch {
        /// The step.
        step: Step,
        /// What it said.
        code: Code,
    },
    /// The process is not in the state that the step begins with.
    #[error("{step} says {code}: the process is {state}")]
    WrongState {
        /// The step.
        step: Step,
        /// What it said.
        code: Code,
        /// In which state it is.
        state: State,
    },
    /// Anything else.
    #[error("{call} says {code}")]
    Call {
        /// The function.
        call: String,
        /// What it said.
        code: Code,
    },
    /// The process is dead.
    #[error("the process ended in {step}")]
    Died {
        /// The step.
        step: Step,
    },
}

type Pid = c_int;
type GetState = unsafe extern "C" fn(Pid, *mut c_uint) -> c_uint;
type GetThread = unsafe extern "C" fn(Pid, *mut c_int) -> c_uint;
type Lock = unsafe extern "C" fn(Pid, *mut CUcheckpointLockArgs) -> c_uint;
type Checkpoint = unsafe extern "C" fn(Pid, *mut CUcheckpointCheckpointArgs) -> c_uint;
type Restore = unsafe extern "C" fn(Pid, *mut CUcheckpointRestoreArgs) -> c_uint;
type Unlock = unsafe extern "C" fn(Pid, *mut CUcheckpointUnlockArgs) -> c_uint;
type Init = unsafe extern "C" fn(c_uint) -> c_uint;
type Number = unsafe extern "C" fn(*mut c_int) -> c_uint;
type ErrorName = unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint;
type ProcAddress = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint) -> c_uint;

/// The driver, with its checkpoint interface. It may be used by several threads.
#[derive(Debug)]
pub struct Driver {
    version: c_int,
    get_state: GetState,
    get_thread: GetThread,
    lock: Lock,
    checkpoint: Checkpoint,
    restore: Restore,
    unlock: Unlock,
    error_name: Option<ErrorName>,
}

/// What of a driver is there, without starting it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The CUDA version, as 1000 * major + 10 * minor.
    pub cuda: i32,
    /// It has the checkpoint interface.
    pub checkpoints: bool,
}

fn open(names: &[&str]) -> Result<&'static Library> {
    let mut why = String::new();
    for name in names {
        // SAFETY: what runs when the driver's library is loaded is the driver's business, as in any CUDA program.
        match unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_LOCAL) } {
            // it is never unloaded: it may have threads
            Ok(library) => return Ok(Box::leak(Box::new(library))),
            Err(e) if why.is_empty() => why = e.to_string(),
            Err(_) => {}
        }
    }
    Err(DriverError::NoDriver { why })
}

/// A function of a library, by its name.
fn symbol<F: Copy>(library: &'static Library, name: &CStr) -> Option<F> {
    // SAFETY: each caller names the type that the interface's documentation gives the function of this name.
    unsafe { library.get::<F>(name).ok().map(|f| *f) }
}

/// The newest version of a driver's function.
fn newest<F: Copy>(library: &'static Library, name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    if let Some(address_of) = symbol::<ProcAddress>(library, c"cuGetProcAddress_v2") {
        for version in VERSIONS {
            let (mut found, mut status) = (std::ptr::null_mut(), 0);
            // SAFETY: places for the two results live across the call; the name ends with a zero.
            let r = unsafe { address_of(name.as_ptr(), &raw mut found, version, 0, &raw mut status) };
            if r == 0 && !found.is_null() {
                // SAFETY: a pointer to a function of the type that the caller names, of the same size.
                return Some(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&found) });
            }
        }
    }
    symbol(library, name)
}

/// Looks for a driver, and does not start it.
///
/// # Errors
/// If there is none.
pub fn find() -> Result<Found> {
    let library = open(&NAMES)?;
    Ok(Found {
        cuda: version_of(library),
        checkpoints: newest::<Restore>(library, c"cuCheckpointProcessRestore").is_some(),
    })
}

fn version_of(library: &'static Library) -> c_int {
    let mut version = 0;
    if let Some(get) = symbol::<Number>(library, c"cuDriverGetVersion") {
        // SAFETY: a place for one int.
        unsafe { get(&raw mut version) };
    }
    version
}

impl Driver {
    /// Loads and starts it.
    ///
    /// # Errors
    /// If there is none, if it is too old, if it does not start.
    pub fn load() -> Result<Driver> {
        let library = open(&NAMES)?;
        let version = version_of(library);
        let too_old = || {
            let driver = Management::load().and_then(|m| m.driver()).map_or(String::new(), |v| format!("{v} "));
            DriverError::TooOld { driver, cuda: version }
        };
        let driver = Driver {
            version,
            get_state: newest(library, c"cuCheckpointProcessGetState").ok_or_else(too_old)?,
            get_thread: newest(library, c"cuCheckpointProcessGetRestoreThreadId").ok_or_else(too_old)?,
            lock: newest(library, c"cuCheckpointProcessLock").ok_or_else(too_old)?,
            checkpoint: newest(library, c"cuCheckpointProcessCheckpoint").ok_or_else(too_old)?,
            restore: newest(library, c"cuCheckpointProcessRestore").ok_or_else(too_old)?,
            unlock: newest(library, c"cuCheckpointProcessUnlock").ok_or_else(too_old)?,
            error_name: symbol(library, c"cuGetErrorName"),
        };
        let init: Init = symbol(library, c"cuInit").ok_or_else(too_old)?;
        // SAFETY: no memory is involved.
        match unsafe { init(0) } {
            0 => Ok(driver),
            number => Err(DriverError::Init { code: driver.code(number) }),
        }
    }

    /// The CUDA version, as 1000 * major + 10 * minor.
    #[must_use]
    pub fn version(&self) -> i32 {
        self.version
    }

    fn code(&self, number: u32) -> Code {
        let mut text = std::ptr::null();
        // SAFETY: a place for one pointer; what it points to then is a constant of the driver, or nothing.
        let name = self.error_name.and_then(|get| unsafe {
            (get(number, &raw mut text) == 0 && !text.is_null())
                .then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        });
        Code { number, name: name.unwrap_or_else(|| "an error without a name".to_owned()) }
    }

    fn call(&self, call: &str, number: u32) -> Result<()> {
        if number == 0 {
            return Ok(());
        }
        Err(DriverError::Call { call: call.to_owned(), code: self.code(number) })
    }

    /// In which state a process is.
    ///
    /// # Errors
    /// If it is no CUDA process.
    pub fn state(&self, pid: i32) -> Result<State> {
        let mut state = 0;
        // SAFETY: a place for one number.
        let r = unsafe { (self.get_state)(pid, &raw mut state) };
        self.call("cuCheckpointProcessGetState", r)?;
        Ok(State::of(state))
    }

    /// The thread of a process that does what is asked for.
    ///
    /// # Errors
    /// If it is no CUDA process.
    pub fn restore_thread(&self, pid: i32) -> Result<i32> {
        let mut tid = 0;
        // SAFETY: a place for one number.
        let r = unsafe { (self.get_thread)(pid, &raw mut tid) };
        self.call("cuCheckpointProcessGetRestoreThreadId", r)?;
        Ok(tid)
    }

    fn step(&self, pid: i32, step: Step, number: u32) -> Result<()> {
        if number == 0 {
            return Ok(());
        }
        if !lives(pid) {
            return Err(DriverError::Died { step });
        }
        let code = self.code(number);
        let pairs = step == Step::Restore;
        Err(match number {
            2 => DriverError::NoMemory { step, code },
            // invalid value, no device, invalid device
            1 | 100 | 101 if pairs => DriverError::Mismatch { step, code },
            401 => DriverError::WrongState { step, code, state: self.state(pid).unwrap_or(State::Failed) },
            801 => DriverError::Unsupported { step, code },
            _ => DriverError::Call { call: step.to_string(), code },
        })
    }

    /// From here on CUDA calls of the process wait, and none is under way.
    ///
    /// # Errors
    /// If that did not happen in time (no limit if that is zero), or cannot be.
    pub fn lock(&self, pid: i32, limit: Duration) -> Result<()> {
        let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let mut args = CUcheckpointLockArgs { timeoutMs: millis, reserved0: 0, reserved1: [0; 7] };
        // SAFETY: arguments as the documentation has them, which live across the call.
        let number = unsafe { (self.lock)(pid, &raw mut args) };
        match number {
            // not ready, timeout
            600 | 909 if lives(pid) => Err(DriverError::LockTimeout { limit }),
            number => self.step(pid, Step::Lock, number),
        }
    }

    /// Device memory comes into the memory of the process, which lets go of its GPUs.
    ///
    /// # Errors
    /// What the driver said.
    pub fn checkpoint(&self, pid: i32) -> Result<()> {
        // SAFETY: all of the structure may be zeros: no custom storage, and nothing that is reserved.
        let mut args: CUcheckpointCheckpointArgs = unsafe { std::mem::zeroed() };
        // SAFETY: arguments as the documentation has them, which live across the call.
        let number = unsafe { (self.checkpoint)(pid, &raw mut args) };
        self.step(pid, Step::Checkpoint, number)
    }

    /// The reverse of it, with GPUs in the place of others.
    ///
    /// # Errors
    /// What the driver said.
    pub fn restore(&self, pid: i32, pairs: &[(Uuid, Uuid)]) -> Result<()> {
        if !pairs.is_empty() && self.version < PAIRS_SINCE {
            return Err(DriverError::NoPairs);
        }
        let raw = |uuid: Uuid| CUuuid { bytes: uuid.0.map(|b| b as c_char) };
        let mut pairs: Vec<CUcheckpointGpuPair> =
            pairs.iter().map(|(old, new)| CUcheckpointGpuPair { oldUuid: raw(*old), newUuid: raw(*new) }).collect();
        // SAFETY: all of the structure may be zeros.
        let mut args: CUcheckpointRestoreArgs = unsafe { std::mem::zeroed() };
        if !pairs.is_empty() {
            args.gpuPairs = pairs.as_mut_ptr();
            args.gpuPairsCount = c_uint::try_from(pairs.len()).unwrap_or(0);
        }
        // SAFETY: arguments as the documentation has them, which live across the call, as do the pairs.
        let number = unsafe { (self.restore)(pid, &raw mut args) };
        self.step(pid, Step::Restore, number)
    }

    /// CUDA calls go on.
    ///
    /// # Errors
    /// What the driver said.
    pub fn unlock(&self, pid: i32) -> Result<()> {
        // SAFETY: all of the structure may be zeros.
        let mut args: CUcheckpointUnlockArgs = unsafe { std::mem::zeroed() };
        // SAFETY: arguments as the documentation has them, which live across the call.
        let number = unsafe { (self.unlock)(pid, &raw mut args) };
        self.step(pid, Step::Unlock, number)
    }

    /// The same about a process of which somebody may have asked something who is dead: its state tells nothing as long as
    /// that waits for the restore thread.
    ///
    /// # Errors
    /// What the driver said, or that there is no way from where it is.
    pub fn bring_back_from_the_dead(&self, pid: i32, to: State) -> Result<()> {
        for _ in 0..ROUNDS {
            match self.bring_back(pid, to) {
                Ok(()) if to != State::Running => return Ok(()),
                // one question at a time: what is refused was refused behind whatever was asked before
                Ok(()) => match self.unlock(pid) {
                    Err(DriverError::WrongState { state: State::Running, .. }) => break,
                    Err(e @ DriverError::Died { .. }) => return Err(e),
                    Ok(()) | Err(_) => {}
                },
                Err(e @ DriverError::Died { .. }) => return Err(e),
                // the state changed behind our look at it
                Err(_) => std::thread::sleep(TURN),
            }
        }
        // a driver that refuses without asking the thread has this long to show what is still to come
        let began = Instant::now();
        while to == State::Running && began.elapsed() < SETTLED {
            self.bring_back(pid, to)?;
            std::thread::sleep(TURN);
        }
        self.bring_back(pid, to)
    }

    /// Brings a process into the state that it was found in, from whichever it is in.
    ///
    /// # Errors
    /// What the driver said, or that there is no way from where it is.
    pub fn bring_back(&self, pid: i32, to: State) -> Result<()> {
        // a step may be under way that somebody asked for who is dead
        const LIMIT: Duration = Duration::from_secs(600);
        let began = Instant::now();
        loop {
            match (self.state(pid)?, to) {
                (now, to) if now == to => return Ok(()),
                (State::Checkpointed, State::Running | State::Locked) => self.restore(pid, &[])?,
                (State::Locked, State::Running) => self.unlock(pid)?,
                (State::Between(_), _) if began.elapsed() < LIMIT && lives(pid) => {
                    std::thread::sleep(TURN);
                }
                (state, _) => {
                    let code = Code { number: 401, name: "no way back".to_owned() };
                    return Err(DriverError::WrongState { step: Step::Restore, code, state });
                }
            }
        }
    }
}

/// Whether a process can still run.
fn lives(pid: i32) -> bool {
    match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(text) => {
            let state = text.iter().rposition(|&b| b == b')').and_then(|i| text.get(i.checked_add(2)?)).copied();
            !matches!(state, Some(b'X' | b'x' | b'Z') | None)
        }
        Err(_) => false,
    }
}

/// The UUID of a GPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Reads `GPU-8-4-4-4-12`, in hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Uuid> {
        let digits = text.strip_prefix("GPU-")?;
        let parts: Vec<&str> = digits.split('-').collect();
        if parts.iter().map(|part| part.len()).ne([8, 4, 4, 4, 12]) {
            return None;
        }
        let joined = parts.concat();
        if !joined.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u128::from_str_radix(&joined, 16).ok().map(|number| Uuid(number.to_be_bytes()))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:032x}", u128::from_be_bytes(self.0));
        let (a, rest) = text.split_at(8);
        let (b, rest) = rest.split_at(4);
        let (c, rest) = rest.split_at(4);
        let (d, e) = rest.split_at(4);
        write!(f, "GPU-{a}-{b}-{c}-{d}-{e}")
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let text = "GPU-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";
        assert_eq!(Uuid::parse(text).unwrap().to_string(), text);
        for bad in ["", "GPU-", "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9", "GPU-0a1b2c3d4e5f60718293a4b5c6d7e8f9"] {
            assert_eq!(Uuid::parse(bad), None, "{bad}");
        }
        assert_eq!(Uuid::parse("GPU-+a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"), None);
        assert_eq!(Uuid::parse("GPU-äa1b2c3-4e5f-6071-8293-a4b5c6d7e8f9"), None);
    }

    #[test]
    fn states() {
        for number in 0..8 {
            assert_eq!(State::of(number).number(), number);
        }
    }

    #[test]
    fn texts() {
        let old = DriverError::TooOld { driver: "550.54 ".into(), cuda: 12_040 }.to_string();
        assert!(old.contains("550.54 (CUDA 12.4)") && old.contains("570"), "{old}");
    }

    /// With a driver or without one, and without a GPU.
    #[test]
    fn loads_or_says_why_not() {
        match Driver::load() {
            Ok(driver) => assert!(driver.state(i32::MAX).is_err()),
            Err(e) => assert!(e.to_string().contains("NVIDIA driver"), "{e}"),
        }
    }
}
