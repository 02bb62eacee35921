//! The answers, each in one place.

use standstill_images::proto::{CriuDumpResp, CriuPageServerInfo, CriuReqType, CriuResp, CriuRestoreResp, CriuVersion};

use super::Fault;

/// The version of CRIU that clients take us for.
const VERSION: (i32, i32) = (4, 2);

/// Yes or no, with what was wrong.
pub fn plain(kind: CriuReqType, result: &Result<(), Fault>) -> CriuResp {
    let fault = result.as_ref().err();
    CriuResp {
        r#type: kind.into(),
        success: fault.is_none(),
        cr_errno: fault.and_then(|f| f.errno),
        cr_errmsg: fault.map(|f| format!("Error: {}", f.text)),
        ..CriuResp::default()
    }
}

/// After a dump.
pub fn dumped(result: &Result<(), Fault>) -> CriuResp {
    CriuResp { dump: Some(CriuDumpResp { restored: Some(false) }), ..plain(CriuReqType::Dump, result) }
}

/// What one who had itself dumped reads after its restore.
pub fn dumped_and_restored() -> CriuResp {
    CriuResp { dump: Some(CriuDumpResp { restored: Some(true) }), ..plain(CriuReqType::Dump, &Ok(())) }
}

/// After a restore; the process id is -1 if there is none, as CRIU has it.
pub fn restored(result: &Result<i32, Fault>) -> CriuResp {
    let (pid, result) = match result {
        Ok(pid) => (*pid, Ok(())),
        Err(fault) => (-1, Err(fault.clone())),
    };
    CriuResp { restore: Some(CriuRestoreResp { pid }), ..plain(CriuReqType::Restore, &result) }
}

/// A page server runs as this process, at this port.
pub fn page_server(pid: u32, port: u16) -> CriuResp {
    let ps = CriuPageServerInfo { pid: i32::try_from(pid).ok(), port: Some(port.into()), ..Default::default() };
    CriuResp { ps: Some(ps), ..plain(CriuReqType::PageServer, &Ok(())) }
}

/// Which version this is.
pub fn version() -> CriuResp {
    let version = CriuVersion { major_number: VERSION.0, minor_number: VERSION.1, ..CriuVersion::default() };
    CriuResp { version: Some(version), ..plain(CriuReqType::Version, &Ok(())) }
}
