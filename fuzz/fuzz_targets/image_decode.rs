//! An image of any kind, as JSON and as its Rust types: no panic, and what was read can be written. The first byte picks
//! the kind, whose magics are put before the rest; 255 says that the rest is a whole image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_images::json::{self, Style};
use standstill_images::{proto, Entry, GhostContent, Header, ImageKind, Reader, WithPayload, Writer};
use standstill_images::{MAGIC_COMMON, MAGIC_SERVICE};

/// Reads all entries, writes them, and reads that again.
fn plain<T: Entry + PartialEq>(kind: ImageKind, bytes: &[u8]) {
    let Ok(entries) = read::<T>(kind, bytes) else { return };
    let mut out = Writer::new(kind, "image", Vec::new());
    for entry in &entries {
        out.write(entry).expect("what was read can be written");
    }
    let out = out.into_inner().expect("memory takes all");
    assert!(entries == read::<T>(kind, &out).expect("what was written can be read"));
}

fn read<T: Entry>(kind: ImageKind, bytes: &[u8]) -> standstill_images::Result<Vec<T>> {
    Reader::new(kind, "image", bytes)?.all()
}

fn with_payload<T: WithPayload>(kind: ImageKind, bytes: &[u8]) {
    let Ok(entries) = Reader::new(kind, "image", bytes).and_then(Reader::all_with_payload::<T>) else { return };
    let mut out = Writer::new(kind, "image", Vec::new());
    for (entry, payload) in &entries {
        out.write_with_payload(entry, payload).expect("what was read can be written");
    }
    let out = out.into_inner().expect("memory takes all");
    let again = Reader::new(kind, "image", &out).and_then(Reader::all_with_payload::<T>);
    assert_eq!(entries.len(), again.expect("what was written can be read").len());
}

macro_rules! typed {
    ($kind:expr, $bytes:expr; $($entry:ident)*) => {
        match $kind.entry() {
            $(Some(name) if name == <proto::$entry as prost::Name>::NAME => plain::<proto::$entry>($kind, $bytes),)*
            _ => {}
        }
    };
}

fn as_types(kind: ImageKind, bytes: &[u8]) {
    match kind {
        ImageKind::PipesData | ImageKind::FifoData => with_payload::<proto::PipeDataEntry>(kind, bytes),
        ImageKind::SkQueues => with_payload::<proto::SkPacketEntry>(kind, bytes),
        ImageKind::IpcnsShm => with_payload::<proto::IpcShmEntry>(kind, bytes),
        ImageKind::IpcnsMsg => with_payload::<proto::IpcMsgEntry>(kind, bytes),
        ImageKind::IpcnsSem => with_payload::<proto::IpcSemEntry>(kind, bytes),
        ImageKind::TcpStream => with_payload::<proto::TcpStreamEntry>(kind, bytes),
        ImageKind::BpfmapData => with_payload::<proto::BpfmapDataEntry>(kind, bytes),
        ImageKind::GhostFile => {
            if let Ok((entry, GhostContent::Chunks(_))) = Reader::new(kind, "image", bytes).and_then(Reader::ghost) {
                assert_eq!(entry.chunks, Some(true));
            }
        }
        ImageKind::Pagemap | ImageKind::ShmemPagemap => {
            let _ = Reader::new(kind, "image", bytes).and_then(Reader::pagemap);
        }
        _ => typed!(kind, bytes; InventoryEntry FdinfoEntry RegFileEntry ExtFileEntry NsFileEntry EventfdFileEntry
            EventpollFileEntry EventpollTfdEntry SignalfdEntry InotifyFileEntry InotifyWdEntry FanotifyFileEntry
            FanotifyMarkEntry CoreEntry TaskKobjIdsEntry MmEntry VmaEntry PipeEntry FifoEntry PstreeEntry SaEntry
            UnixSkEntry InetSkEntry PacketSockEntry NetlinkSkEntry ItimerEntry PosixTimerEntry CredsEntry UtsnsEntry
            IpcVarEntry FsEntry RemapFilePathEntry MemfdInodeEntry MntEntry NetDeviceEntry NetnsEntry AutofsEntry
            BinfmtMiscEntry TtyFileEntry TtyInfoEntry TtyDataEntry FileLockEntry RlimitEntry SiginfoEntry TunfileEntry
            CgroupEntry TimerfdEntry CpuinfoEntry SeccompEntry UsernsEntry FileEntry TimensEntry PidnsEntry
            BpfmapFileEntry ApparmorEntry PidfdEntry StatsEntry IrmapCacheEntry),
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let mut image = Vec::new();
    let kind = match first {
        255 => {
            image.extend_from_slice(rest);
            None
        }
        place => {
            let kind = ImageKind::ALL[usize::from(*place) % ImageKind::ALL.len()];
            match kind.header() {
                Header::Common => image.extend_from_slice(&MAGIC_COMMON.to_le_bytes()),
                Header::Service => image.extend_from_slice(&MAGIC_SERVICE.to_le_bytes()),
                Header::Own => {}
                Header::Raw => return,
            }
            image.extend_from_slice(&kind.magic().to_le_bytes());
            image.extend_from_slice(rest);
            Some(kind)
        }
    };
    for pretty in [false, true] {
        let style = Style { pretty, payload: true };
        if let Ok(shown) = json::decode("image", &image, style) {
            let written = json::encode_text("image", json::to_text(&shown, pretty).as_bytes());
            let written = written.expect("what was shown can be encoded");
            assert_eq!(shown, json::decode("image", &written, style).expect("what was encoded can be shown"));
        }
    }
    let _ = json::info("image", &image);
    if let Some(kind) = kind {
        as_types(kind, &image);
    }
});
