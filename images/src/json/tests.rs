use super::decode::{address, size_for_people};
use super::encode::from_address;
use super::*;
use crate::framing::Writer;
use crate::proto::{FdTypes, FileEntry, RegFileEntry};
use crate::table::ImageKind;
use crate::wire::Scalar;

const ALL: Style = Style { pretty: true, payload: true };

fn round_trip(bytes: &[u8]) -> Value {
    for pretty in [true, false] {
        let value = decode("test", bytes, Style { pretty, payload: true }).unwrap();
        assert_eq!(encode("test", &value).unwrap(), bytes, "{value}");
        assert_eq!(encode_text("test", to_text(&value, pretty).as_bytes()).unwrap(), bytes);
    }
    decode("test", bytes, ALL).unwrap()
}

#[test]
fn what_is_unknown_is_kept() {
    let mut bytes = Writer::new(ImageKind::Utsns, "test", Vec::new()).into_inner().unwrap();
    let entry = [10, 1, b'a', 18, 1, b'b', 0xf8, 0x07, 5];
    bytes.extend_from_slice(&[9, 0, 0, 0]);
    bytes.extend_from_slice(&entry);
    let value = round_trip(&bytes);
    assert_eq!(value["entries"][0]["_unknown"], "+AcF\n");
}

#[test]
fn text_that_is_not_utf8_is_kept() {
    let mut image = Writer::new(ImageKind::RegFiles, "test", Vec::new());
    let file = RegFileEntry { name: b"/caf\xe9".to_vec(), flags: 0o500_2003, mnt_id: Some(-1), ..Default::default() };
    image.write(&file).unwrap();
    let value = round_trip(&image.into_inner().unwrap());
    assert_eq!(value["entries"][0]["name"]["base64"], "L2NhZuk=\n");
    assert_eq!(value["entries"][0]["flags"], "O_WRONLY | O_RDWR | O_APPEND | O_NOATIME | 0x100000");
    assert_eq!(value["entries"][0]["mnt_id"], -1);
}

#[test]
fn enum_values_from_later_are_kept() {
    let mut image = Writer::new(ImageKind::Files, "test", Vec::new());
    image.write(&FileEntry { r#type: FdTypes::Reg as i32, id: 7, ..Default::default() }).unwrap();
    let mut bytes = image.into_inner().unwrap();
    assert_eq!(bytes[12..], [8, 1, 16, 7]);
    bytes[13] = 99;
    // The field is required, so that without it there is no entry.
    assert!(matches!(
        decode("test", &bytes, ALL),
        Err(Error::Malformed { entry: 0, source: Malformed::Required { field: "type", .. }, .. })
    ));
}

#[test]
fn payloads_of_another_size_are_refused() {
    for (magic, entry) in [
        ("PIPES_DATA", r#"{"pipe_id": 1, "bytes": 2, "extra": "YQ=="}"#),
        (
            "IPCNS_SEM",
            r#"{"desc": {"key":0,"uid":0,"gid":0,"cuid":0,"cgid":0,"mode":0,"id":0}, "nsems": 2, "extra": [1]}"#,
        ),
        (
            "IPCNS_SEM",
            r#"{"desc": {"key":0,"uid":0,"gid":0,"cuid":0,"cgid":0,"mode":0,"id":0}, "nsems": 1, "extra": [65536]}"#,
        ),
        ("GHOST_FILE", r#"{"uid": 0, "gid": 0, "mode": 0, "extra": "Y"}"#),
    ] {
        let text = format!(r#"{{"magic": "{magic}", "entries": [{entry}]}}"#);
        let error = encode_text("test", text.as_bytes()).unwrap_err();
        assert!(matches!(error, Error::Malformed { source: Malformed::Json { .. }, .. }), "{error:?}");
    }
}

#[test]
fn json_that_is_no_image() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"magic": "X"}"#,
        r#"{"magic": "PAGES", "entries": []}"#,
        r#"{"magic": "CORE", "entries": 1}"#,
        r#"{"magic": "CORE", "entries": [1]}"#,
        r#"{"magic": "CORE", "entries": [{}]}"#,
        r#"{"magic": "UTSNS", "entries": [{"nodename": "a", "domainname": 1}]}"#,
        r#"{"magic": "UTSNS", "entries": [{"nodename": "a", "domainname": "b", "more": 1}]}"#,
        r#"{"magic": "UTSNS", "entries": [{"nodename": "a", "domainname": "b", "_unknown": "/w=="}]}"#,
        r#"{"magic": "PAGEMAP", "entries": [{"pages_id": 4294967296}]}"#,
        r#"{"magic": "PAGEMAP", "entries": [{"pages_id": -1}]}"#,
        r#"{"magic": "PAGEMAP", "entries": [{"pages_id": 1.5}]}"#,
        r#"{"magic": "PAGEMAP", "entries": [{"pages_id": true}, {"vaddr": "0y", "compat_nr_pages": 1}]}"#,
    ] {
        assert!(encode_text("test", text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn addresses() {
    let field = schema::message("inet_sk_entry").unwrap().fields.iter().find(|field| field.print.address).unwrap();
    for (words, text) in [
        (vec![0x0100_007f], "127.0.0.1"),
        (vec![0, 0, 0, 0], "::"),
        (vec![0, 0, 0, 0x0100_0000], "::1"),
        (vec![0, 0, 0xffff_0000, 0x0100_007f], "::ffff:7f00:1"),
        (vec![0xb80d_0120, 0, 0, 0x0200_0000], "2001:db8::2"),
    ] {
        let scalars: Vec<Scalar<'_>> = words.iter().map(|word| Scalar::Unsigned(u64::from(*word))).collect();
        assert_eq!(address(field, &scalars).unwrap(), text);
        assert_eq!(from_address(field, &text.into()), Some(words));
    }
}

#[test]
fn sizes() {
    assert_eq!(size_for_people(0), "0B");
    assert_eq!(size_for_people(1023), "1023B");
    assert_eq!(size_for_people(2048), "2KB");
    assert_eq!(size_for_people(1536), "1.5KB");
}
