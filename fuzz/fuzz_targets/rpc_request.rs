//! A packet of CRIU's RPC: a request, then the options that it stands for, whoever sent it; and that what we would say of
//! it fits into an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::options::Options;
use standstill::rpc::request::{options, Client, Purpose};
use standstill::rpc::{answer, wire};
use standstill_images::proto::CriuReqType;

fuzz_target!(|packet: &[u8]| {
    let request = match wire::decode(packet) {
        Ok(request) => request,
        Err(fault) => {
            assert!(wire::encode(answer::plain(CriuReqType::Empty, &Err(fault))).len() < 1024);
            return;
        }
    };
    let opts = request.opts.unwrap_or_default();
    for purpose in
        [Purpose::Dump, Purpose::PreDump, Purpose::Restore, Purpose::Check, Purpose::PageServer, Purpose::Cpuinfo]
    {
        for is_parent in [true, false] {
            match options(&Options::default(), &opts, Client { pid: 7, is_parent }, purpose) {
                Ok(options) => {
                    let _ = (options.conflict(purpose == Purpose::Restore), options.refuse_unsupported());
                }
                Err(fault) => assert!(wire::encode(answer::dumped(&Err(fault))).len() < 1024),
            }
        }
    }
});
