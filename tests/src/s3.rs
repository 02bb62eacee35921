//! A server of S3's protocol on the loopback, as far as a checkpoint needs it, that can be told to fail.
//!
//! It has one bucket (`bucket`), keeps objects in memory, and knows PUT, GET with a range, HEAD, DELETE, lists with a
//! prefix and a delimiter, and uploads in parts. It compares the SHA-256 that a client states with what arrived, and wants the
//! right access key; it does not check signatures.
//!
//! Sources: Amazon S3 API Reference (PutObject, GetObject, HeadObject, DeleteObject, ListObjectsV2, CreateMultipartUpload,
//! UploadPart, CompleteMultipartUpload, AbortMultipartUpload).

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The access key that is let in.
pub const ACCESS_KEY: &str = "test-access-key";

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An answer with this status.
    Status(u16),
    /// The connection ends in the middle of the answer, or of the request's body.
    Cut,
    /// The answer comes this much later.
    Late(Duration),
    /// A byte of what is sent is another one.
    WrongByte,
    /// The object is stored one byte shorter than it was sent.
    Shorter,
}

#[derive(Debug)]
struct Rule {
    method: &'static str,
    part: String,
    skip: usize,
    times: usize,
    fault: Fault,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Arc<Vec<u8>>>,
    uploads: BTreeMap<String, (String, BTreeMap<u32, Vec<u8>>)>,
    next_upload: u32,
    rules: Vec<Rule>,
    requests: Vec<String>,
}

/// The server. It ends when this is dropped.
pub struct S3 {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    ended: Arc<AtomicBool>,
}

impl S3 {
    /// Starts it.
    pub fn start() -> S3 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let (state, ended) = (Arc::new(Mutex::new(State::default())), Arc::new(AtomicBool::new(false)));
        let (of_thread, end) = (Arc::clone(&state), Arc::clone(&ended));
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if end.load(Ordering::Acquire) {
                    return;
                }
                let Ok(connection) = connection else { continue };
                let state = Arc::clone(&of_thread);
                std::thread::spawn(move || serve(&connection, &state));
            }
        });
        S3 { address, state, ended }
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What a client must be told to reach it, with few retries.
    pub fn options(&self) -> Vec<(String, String)> {
        let endpoint = self.endpoint();
        let pairs = [
            ("endpoint", endpoint.as_str()),
            ("allow_http", "true"),
            ("region", "test-1"),
            ("access_key_id", ACCESS_KEY),
            ("secret_access_key", "test-secret"),
            ("retries", "2"),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// From now on, requests of a method whose target has this part in it fail, so often, after some that do not.
    pub fn fail(&self, method: &'static str, part: &str, skip: usize, times: usize, fault: Fault) {
        self.state().rules.push(Rule { method, part: part.to_owned(), skip, times, fault });
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.state().rules.clear();
    }

    /// All objects.
    pub fn objects(&self) -> BTreeMap<String, Arc<Vec<u8>>> {
        self.state().objects.clone()
    }

    /// Changes, adds or removes an object behind the back of everyone.
    pub fn set(&self, name: &str, content: Option<Vec<u8>>) {
        match content {
            Some(content) => self.state().objects.insert(name.to_owned(), Arc::new(content)),
            None => self.state().objects.remove(name),
        };
    }

    /// Uploads in parts that were begun and neither completed nor aborted.
    pub fn uploads(&self) -> usize {
        self.state().uploads.len()
    }

    /// First lines of all requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
    }
}

struct Request {
    method: String,
    /// Path without the slash before it, decoded.
    path: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// For HEAD.
    length: Option<usize>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, headers: Vec::new(), body: body.into(), length: None }
    }

    fn error(status: u16, code: &str) -> Answer {
        let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{code}</Message></Error>");
        Answer::new(status, text)
    }
}

fn serve(connection: &TcpStream, state: &Mutex<State>) {
    let _ = connection.set_nodelay(true);
    let mut reader = BufReader::with_capacity(1 << 16, connection);
    while let Ok(Some((request, fault))) = receive(&mut reader, state) {
        if let Some(Fault::Late(wait)) = fault {
            std::thread::sleep(wait);
        }
        let mut answer = match fault {
            Some(Fault::Status(status)) => {
                Answer::error(status, if status == 403 { "AccessDenied" } else { "SlowDown" })
            }
            _ => act(&request, fault, &mut state.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        if let (Some(Fault::WrongByte), Some(byte)) = (fault, answer.body.last_mut()) {
            *byte ^= 1;
        }
        let cut = fault == Some(Fault::Cut);
        if send(connection, &answer, cut).is_err() || cut {
            break;
        }
    }
    let _ = connection.shutdown(Shutdown::Both);
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits: String = rest.by_ref().take(2).map(char::from).collect();
            bytes.push(u8::from_str_radix(&digits, 16).unwrap_or(b'?'));
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn receive(reader: &mut impl BufRead, state: &Mutex<State>) -> io::Result<Option<(Request, Option<Fault>)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let fault = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests.push(format!("{method} {target}"));
        let rule = state.rules.iter_mut().find(|r| r.times > 0 && method == r.method && target.contains(&r.part));
        rule.and_then(|rule| {
            if rule.skip > 0 {
                rule.skip -= 1;
                return None;
            }
            rule.times -= 1;
            Some(rule.fault)
        })
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    });
    let mut request = Request {
        method: method.to_owned(),
        path: decode(path.trim_start_matches('/')),
        query: query.collect(),
        headers: BTreeMap::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((key, value)) = line.trim_end().split_once(':') else { break };
        request.headers.insert(key.to_lowercase(), value.trim().to_owned());
    }
    let length: usize = request.headers.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    if fault == Some(Fault::Cut) && method == "PUT" && length > 0 {
        // what arrives is thrown away, and there is no answer
        io::copy(&mut reader.take(length as u64 / 2), &mut io::sink())?;
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body)?;
    Ok(Some((request, fault)))
}

fn send(mut to: &TcpStream, answer: &Answer, cut: bool) -> io::Result<()> {
    let length = answer.length.unwrap_or(answer.body.len());
    let mut head = format!("HTTP/1.1 {} Answer\r\nContent-Length: {length}\r\n", answer.status);
    for (key, value) in &answer.headers {
        head += &format!("{key}: {value}\r\n");
    }
    to.write_all((head + "\r\n").as_bytes())?;
    to.write_all(if cut { &answer.body[..answer.body.len() / 2] } else { &answer.body })?;
    to.flush()
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec()
}

/// What a client says of its body must be so.
fn is_as_stated(request: &Request) -> bool {
    use base64::Engine as _;
    let sum = sha256(&request.body);
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    let signed = request.headers.get("x-amz-content-sha256").is_none_or(|said| *said == hex);
    let base64 = base64::engine::general_purpose::STANDARD.encode(&sum);
    signed && request.headers.get("x-amz-checksum-sha256").is_none_or(|said| *said == base64)
}

fn act(request: &Request, fault: Option<Fault>, state: &mut State) -> Answer {
    let allowed = request.headers.get("authorization").is_some_and(|text| text.contains(&format!("{ACCESS_KEY}/")));
    if !allowed {
        return Answer::error(403, "AccessDenied");
    }
    let (bucket, name) = request.path.split_once('/').unwrap_or((&request.path, ""));
    if bucket != "bucket" {
        return Answer::error(404, "NoSuchBucket");
    }
    if !is_as_stated(request) {
        return Answer::error(400, "BadDigest");
    }
    let has = |key: &str| request.query.contains_key(key);
    match request.method.as_str() {
        "GET" if name.is_empty() && has("list-type") => list(&request.query, state),
        "GET" | "HEAD" => get(request, name, state),
        "POST" if has("uploads") => {
            state.next_upload += 1;
            let id = format!("upload-{}", state.next_upload);
            state.uploads.insert(id.clone(), (name.to_owned(), BTreeMap::new()));
            Answer::new(
                200,
                format!(
                    "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>{name}</Key>\
                     <UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
                ),
            )
        }
        "PUT" if has("partNumber") => {
            let number = request.query.get("partNumber").and_then(|n| n.parse().ok()).unwrap_or(0);
            let id = request.query.get("uploadId").cloned().unwrap_or_default();
            let Some((_, parts)) = state.uploads.get_mut(&id) else { return Answer::error(404, "NoSuchUpload") };
            parts.insert(number, request.body.clone());
            let mut answer = Answer::new(200, "");
            answer.headers.push(("ETag", format!("\"part-{number}\"")));
            answer
        }
        "POST" if has("uploadId") => complete(request, name, fault, state),
        "PUT" => {
            let mut content = request.body.clone();
            if fault == Some(Fault::Shorter) {
                content.pop();
            }
            state.objects.insert(name.to_owned(), Arc::new(content));
            let mut answer = Answer::new(200, "");
            answer.headers.push(("ETag", "\"whole\"".to_owned()));
            answer
        }
        "DELETE" if has("uploadId") => {
            match state.uploads.remove(request.query.get("uploadId").map_or("", String::as_str)) {
                Some(_) => Answer::new(204, ""),
                None => Answer::error(404, "NoSuchUpload"),
            }
        }
        "DELETE" => {
            state.objects.remove(name);
            Answer::new(204, "")
        }
        _ => Answer::error(405, "MethodNotAllowed"),
    }
}

fn complete(request: &Request, name: &str, fault: Option<Fault>, state: &mut State) -> Answer {
    let id = request.query.get("uploadId").map_or("", String::as_str);
    let Some((_, parts)) = state.uploads.remove(id) else { return Answer::error(404, "NoSuchUpload") };
    let text = String::from_utf8_lossy(&request.body);
    let numbers: Vec<u32> = text
        .split("<PartNumber>")
        .skip(1)
        .filter_map(|rest| rest.split('<').next().and_then(|number| number.parse().ok()))
        .collect();
    let mut content = Vec::new();
    for (at, number) in numbers.iter().enumerate() {
        let Some(part) = parts.get(number) else { return Answer::error(400, "InvalidPart") };
        // S3 takes no smaller parts but the last
        if at + 1 < numbers.len() && part.len() < 5 << 20 {
            return Answer::error(400, "EntityTooSmall");
        }
        content.extend_from_slice(part);
    }
    if fault == Some(Fault::Shorter) {
        content.pop();
    }
    state.objects.insert(name.to_owned(), Arc::new(content));
    Answer::new(
        200,
        format!(
            "<?xml version=\"1.0\"?><CompleteMultipartUploadResult><Bucket>bucket</Bucket><Key>{name}</Key>\
             <ETag>\"parts\"</ETag></CompleteMultipartUploadResult>"
        ),
    )
}

fn get(request: &Request, name: &str, state: &State) -> Answer {
    let Some(object) = state.objects.get(name) else {
        // an answer to HEAD has no body
        return if request.method == "HEAD" { Answer::new(404, "") } else { Answer::error(404, "NoSuchKey") };
    };
    let range = request.headers.get("range").and_then(|text| {
        let (from, to) = text.strip_prefix("bytes=")?.split_once('-')?;
        Some(from.parse::<usize>().ok()?..to.parse::<usize>().ok()?.saturating_add(1).min(object.len()))
    });
    let mut answer = match range {
        Some(range) if range.start >= object.len() => return Answer::error(416, "InvalidRange"),
        Some(range) => {
            let mut answer = Answer::new(206, &object[range.clone()]);
            let text = format!("bytes {}-{}/{}", range.start, range.end - 1, object.len());
            answer.headers.push(("Content-Range", text));
            answer
        }
        None => Answer::new(200, object.as_slice()),
    };
    answer.headers.push(("ETag", "\"some\"".to_owned()));
    answer.headers.push(("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned()));
    if request.method == "HEAD" {
        answer.length = Some(object.len());
        answer.body.clear();
    }
    answer
}

fn list(query: &BTreeMap<String, String>, state: &State) -> Answer {
    let prefix = query.get("prefix").map_or("", String::as_str);
    let mut text = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
    for (name, content) in state.objects.iter().filter(|(name, _)| name.starts_with(prefix)) {
        if name[prefix.len()..].contains('/') {
            continue;
        }
        text += &format!(
            "<Contents><Key>{name}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
             <ETag>\"some\"</ETag></Contents>",
            content.len()
        );
    }
    Answer::new(200, text + "</ListBucketResult>")
}
