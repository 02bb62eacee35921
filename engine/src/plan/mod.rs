//! Writing plans: what the executor is to do in a task, as a list that can be printed, compared and checked.
//!
//! A [`Plan`] is position-independent: its data is addressed from its own start, and placed with it.

pub mod arena;
pub mod names;

use standstill_restorer::plan::{Code, Expect, Kind, Op};

use crate::error::{Error, Result};
use crate::sys::memory::bytes_of;

/// An operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A value.
    Imm(u64),
    /// Data of this plan, by its offset.
    Data(u64),
    /// The result of an earlier operation of this plan.
    Result(u32),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Arg {
        Arg::Imm(v)
    }
}
impl From<i32> for Arg {
    fn from(v: i32) -> Arg {
        Arg::Imm(v as i64 as u64)
    }
}
impl From<u32> for Arg {
    fn from(v: u32) -> Arg {
        Arg::Imm(u64::from(v))
    }
}
impl From<i64> for Arg {
    fn from(v: i64) -> Arg {
        Arg::Imm(v as u64)
    }
}
impl From<usize> for Arg {
    fn from(v: usize) -> Arg {
        Arg::Imm(v as u64)
    }
}

/// Which operation of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At(pub u32);

/// Where data of a plan lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Offset within the plan's data.
    pub offset: u64,
    /// Its length.
    pub len: usize,
}

impl From<At> for Arg {
    fn from(at: At) -> Arg {
        Arg::Result(at.0)
    }
}

impl From<Data> for Arg {
    fn from(d: Data) -> Arg {
        Arg::Data(d.offset)
    }
}

/// What an operation is for, for the message when it fails.
pub type Label = std::borrow::Cow<'static, str>;

/// A list of operations, and the data they point to.
#[derive(Debug, Default)]
pub struct Plan {
    ops: Vec<Op>,
    labels: Vec<Label>,
    data: Vec<u8>,
}

impl Plan {
    /// A plan without operations.
    pub fn new() -> Plan {
        Plan::default()
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// True before the first operation is added.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of data.
    pub fn data_len(&self) -> usize {
        self.data.len()
    }

    /// Adds data, aligned to 8, that operations can point to.
    pub fn bytes(&mut self, bytes: &[u8]) -> Data {
        self.align(8);
        let offset = self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        Data { offset, len: bytes.len() }
    }

    /// Adds room of `len` zero bytes for an answer, aligned to 64.
    pub fn room(&mut self, len: usize) -> Data {
        self.align(64);
        let offset = self.data.len() as u64;
        self.data.resize(self.data.len() + len, 0);
        Data { offset, len }
    }

    /// Adds a string that ends with a zero byte.
    pub fn string(&mut self, text: &[u8]) -> Data {
        let d = self.bytes(text);
        self.data.push(0);
        d
    }

    /// Adds words.
    pub fn words(&mut self, words: &[u64]) -> Data {
        self.align(8);
        let offset = self.data.len() as u64;
        self.data.reserve(words.len() * 8);
        words.iter().for_each(|w| self.data.extend_from_slice(&w.to_le_bytes()));
        Data { offset, len: words.len() * 8 }
    }

    fn align(&mut self, to: usize) {
        let len = self.data.len().next_multiple_of(to);
        self.data.resize(len, 0);
    }

    /// Adds an operation.
    pub fn op(
        &mut self,
        code: Code,
        nr: i64,
        args: &[Arg],
        expect: Expect,
        want: [i64; 2],
        label: impl Into<Label>,
    ) -> At {
        let mut op =
            Op { code: code as u32, nr: nr as u32, kinds: [0; 6], expect: expect as u8, always: 0, args: [0; 6], want };
        for (i, arg) in args.iter().enumerate().take(6) {
            let (kind, value) = match *arg {
                Arg::Imm(v) => (Kind::Imm, v),
                Arg::Data(v) => (Kind::PlanAddr, v),
                Arg::Result(v) => (Kind::Slot, u64::from(v)),
            };
            op.kinds[i] = kind as u8;
            op.args[i] = value;
        }
        self.ops.push(op);
        self.labels.push(label.into());
        At(self.ops.len() as u32 - 1)
    }

    /// Makes the word at `place` + `offset` point to `target`, when the plan runs.
    pub fn pointer(&mut self, place: Data, offset: u64, target: Data) {
        self.op(
            Code::Store,
            0,
            &[Arg::Data(place.offset + offset), Arg::Data(target.offset)],
            Expect::Any,
            [0; 2],
            "pointer",
        );
    }

    /// A system call that must not fail.
    pub fn call(&mut self, label: impl Into<Label>, nr: i64, args: &[Arg]) -> At {
        self.op(Code::Syscall, nr, args, Expect::NonNegative, [0; 2], label)
    }

    /// A system call that may fail.
    pub fn ask(&mut self, label: impl Into<Label>, nr: i64, args: &[Arg]) -> At {
        self.op(Code::Syscall, nr, args, Expect::Any, [0; 2], label)
    }

    /// A system call that may fail with one of these errno values.
    pub fn call_or(&mut self, label: impl Into<Label>, nr: i64, args: &[Arg], tolerated: [i32; 2]) -> At {
        self.op(Code::Syscall, nr, args, Expect::Tolerate, tolerated.map(|e| -i64::from(e)), label)
    }

    /// A system call that is made even if an operation before it failed, or the engine is gone: it undoes something.
    pub fn always(&mut self, label: impl Into<Label>, nr: i64, args: &[Arg]) -> At {
        let at = self.ask(label, nr, args);
        if let Some(op) = self.ops.last_mut() {
            op.always = 1;
        }
        at
    }

    /// The operation that was added last is run even if one before it failed, or the engine is gone.
    pub fn even_if_orphaned(&mut self) {
        if let Some(op) = self.ops.last_mut() {
            op.always = 1;
        }
    }

    /// A system call with one good result.
    pub fn call_exact(&mut self, label: impl Into<Label>, nr: i64, args: &[Arg], want: i64) -> At {
        self.op(Code::Syscall, nr, args, Expect::Exact, [want, 0], label)
    }

    /// The operations, placed: operands that name data are resolved by the executor from `Control::base`.
    pub fn ops_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.ops.len() * size_of::<Op>());
        self.ops.iter().for_each(|op| bytes.extend_from_slice(bytes_of(op)));
        bytes
    }

    /// The data.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The error of operation `index`, which ended with `result`.
    pub fn error(&self, index: usize, result: i64) -> Error {
        let (Some(op), Some(label)) = (self.ops.get(index), self.labels.get(index)) else {
            return Error::Gone;
        };
        let call = if op.code == Code::Syscall as u32 { names::syscall(op.nr) } else { names::macro_name(op.code) };
        let errno = i32::try_from(-result).ok().filter(|&e| e > 0).unwrap_or(libc::EPROTO);
        if let (true, Ok(pid @ 1..)) = (op.code == Code::Clone as u32, i32::try_from(op.want[0])) {
            return Error::no_task(pid, std::io::Error::from_raw_os_error(errno));
        }
        let operation = match range(op) {
            Some((start, end)) => format!("{label} {start:x}-{end:x}"),
            None => label.to_string(),
        };
        Error::Plan { operation, call, source: std::io::Error::from_raw_os_error(errno) }
    }

    /// Checks what the executor takes for granted: operands point into the data or to earlier results.
    pub fn check(&self) -> Result<()> {
        for (i, op) in self.ops.iter().enumerate() {
            for (&kind, &arg) in op.kinds.iter().zip(&op.args) {
                let good = match kind {
                    k if k == Kind::PlanAddr as u8 => arg <= self.data.len() as u64,
                    k if k == Kind::Slot as u8 => arg < i as u64,
                    _ => true,
                };
                if !good {
                    return Err(Error::Usage {
                        what: format!("operation {i} ({}) of a plan has an operand past its end", self.labels[i]),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The addresses that an operation on areas is about.
fn range(op: &Op) -> Option<(u64, u64)> {
    let of_areas = [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_madvise, libc::SYS_mlock, libc::SYS_munmap];
    let known = op.code == Code::Syscall as u32 && of_areas.contains(&i64::from(op.nr)) && op.kinds[..2] == [0, 0];
    known.then(|| (op.args[0], op.args[0].wrapping_add(op.args[1])))
}

/// Prints a plan, an operation a line.
impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (op, label)) in self.ops.iter().zip(&self.labels).enumerate() {
            let name = if op.code == Code::Syscall as u32 { names::syscall(op.nr) } else { names::macro_name(op.code) };
            write!(f, "{i:5} {name}(")?;
            for (n, (kind, arg)) in op.kinds.iter().zip(&op.args).enumerate() {
                let sep = if n == 0 { "" } else { ", " };
                match kind {
                    k if *k == Kind::PlanAddr as u8 => write!(f, "{sep}data+{arg:#x}")?,
                    k if *k == Kind::Slot as u8 => write!(f, "{sep}result {arg}")?,
                    _ => write!(f, "{sep}{arg:#x}")?,
                }
            }
            writeln!(f, ")  # {label}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operand_past_the_data_is_found() {
        let mut plan = Plan::new();
        let d = plan.string(b"name");
        plan.call("good", libc::SYS_open, &[d.into(), 0.into()]);
        assert!(plan.check().is_ok());
        plan.call("bad", libc::SYS_open, &[Arg::Data(4096)]);
        assert!(plan.check().is_err());
    }

    #[test]
    fn a_result_is_of_an_earlier_operation() {
        let mut plan = Plan::new();
        plan.call("itself", libc::SYS_close, &[Arg::Result(0)]);
        assert!(plan.check().is_err());
    }

    #[test]
    fn plans_print() {
        let mut plan = Plan::new();
        let d = plan.string(b"x");
        plan.call("working folder", libc::SYS_chdir, &[d.into()]);
        assert!(plan.to_string().contains("chdir(data+0x0"));
    }
}
