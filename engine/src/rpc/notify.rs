//! Stages as messages: each is announced to the peer, which answers with NOTIFY and yes or no. Nothing goes on until it
//! does; a peer that goes away instead has said no.
//!
//! Two stages are more than that: the answer to `query-ext-files` may name what belongs to the outside, and
//! `orphan-pts-master` comes with the master of a terminal.

use std::os::fd::BorrowedFd;

use standstill_images::proto::{CriuNotify, CriuReq, CriuReqType, CriuResp};

use super::wire::Connection;
use crate::error::{Error, Result};
use crate::stages::{Listener, Stage};

/// The peer as one who is told.
#[derive(Debug)]
pub struct Notifier<'a>(pub &'a Connection);

fn no(stage: Stage, what: impl Into<String>) -> Error {
    Error::Stage { stage: stage.name(), what: what.into() }
}

impl Notifier<'_> {
    fn ask(&self, stage: Stage, pid: Option<i32>, file: Option<BorrowedFd<'_>>) -> Result<CriuReq> {
        let notify = CriuNotify { script: Some(stage.name().into()), pid };
        let message =
            CriuResp { r#type: CriuReqType::Notify.into(), success: true, notify: Some(notify), ..CriuResp::default() };
        self.0.send(message, file).map_err(|fault| no(stage, fault.text))?;
        let answer = self.0.receive().map_err(|fault| no(stage, fault.text))?;
        let answer = answer.ok_or_else(|| no(stage, "the RPC client is gone"))?;
        if answer.r#type() != CriuReqType::Notify || answer.notify_success != Some(true) {
            return Err(no(stage, "RPC client reported script error"));
        }
        Ok(answer)
    }
}

impl Listener for Notifier<'_> {
    fn reached(&self, stage: Stage, root: Option<i32>) -> Result<()> {
        // clients that know CRIU expect the process id at these two only
        let pid = root.filter(|_| matches!(stage, Stage::SetupNamespaces | Stage::PostRestore));
        self.ask(stage, pid, None).map(drop)
    }

    fn external_files(&self) -> Result<Vec<String>> {
        let answer = self.ask(Stage::QueryExtFiles, None, None)?;
        match answer.opts {
            Some(opts) => Ok(opts.external),
            None => {
                tracing::info!("RPC NOTIFY {}: no `opts` returned.", Stage::QueryExtFiles.name());
                Ok(Vec::new())
            }
        }
    }

    fn orphan_master(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.ask(Stage::OrphanPtsMaster, None, Some(master)).map(drop)
    }
}
