//! What can go wrong with an image: which one, which entry, at which byte, and why.

use std::io;

/// An error of this crate. The message says which image and where; the source says why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image's bytes are not what its kind says.
    #[error("image {image}, entry {entry}, byte {offset}")]
    Malformed {
        /// File name of the image.
        image: String,
        /// Number of the entry, from 0; the number of complete entries when the error is between entries.
        entry: usize,
        /// Where in the image the entry, its size or its payload begins.
        offset: u64,
        /// What is wrong there.
        #[source]
        source: Malformed,
    },
    /// The image is not in the store.
    #[error("image {image} is missing")]
    Missing {
        /// File name of the image.
        image: String,
    },
    /// The store could not do what was asked.
    #[error("cannot {operation} {image}")]
    Io {
        /// File name of the image, or of the folder.
        image: String,
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A name that no image can have (empty, or with a slash in it).
    #[error("{name:?} cannot be the name of an image")]
    Name {
        /// The name.
        name: String,
    },
    /// The image kind's file name has a number in it and none was given, or the other way round.
    #[error("image {template}: a number in the file name is {}", if *.wanted { "missing" } else { "one too many" })]
    Id {
        /// Template of the file name.
        template: &'static str,
        /// Whether the template has a number.
        wanted: bool,
    },
    /// An entry of another type than the image holds.
    #[error("image {image} holds {expected}, not {found}")]
    EntryType {
        /// File name of the image.
        image: String,
        /// What it holds.
        expected: &'static str,
        /// What was asked for or given.
        found: &'static str,
    },
    /// An entry and the payload after it do not fit each other.
    #[error("image {image}: the entry says {stated} bytes of payload, and {given} were given")]
    Payload {
        /// File name of the image.
        image: String,
        /// What the entry says.
        stated: u64,
        /// What was given.
        given: u64,
    },
    /// A stream of images is not one, or was cut short.
    #[error("stream of images, byte {offset}")]
    Stream {
        /// Where in the stream.
        offset: u64,
        /// What is wrong there.
        #[source]
        source: Malformed,
    },
    /// An image is sealed and does not open, or is not and should be.
    #[error("{image} cannot be opened with this key")]
    Sealed {
        /// File name of the image.
        image: String,
        /// Why.
        #[source]
        source: SealFault,
    },
}

/// Why a sealed image does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealFault {
    /// There is no list of sealed images.
    #[error("it is not sealed, or was not written to its end")]
    NotSealed,
    /// The first bytes are not those of a sealed image.
    #[error("it does not begin as a sealed image, or is one of another version")]
    Head,
    /// The key does not belong to the image.
    #[error("it was sealed with another key, or its first bytes were changed")]
    Key,
    /// The image is one of another checkpoint, or was sealed another time.
    #[error("it does not belong to this checkpoint")]
    Checkpoint,
    /// The image is longer or shorter than it was.
    #[error("it is longer or shorter than it was when it was sealed")]
    Size,
    /// Bytes were changed.
    #[error("it was changed: piece {number} of it is not what was sealed")]
    Chunk {
        /// Which piece, from 0.
        number: u32,
    },
    /// The image is listed and not there.
    #[error("it is missing")]
    Gone,
    /// The list of images is malformed although its seal is whole.
    #[error("it is no list of images")]
    Manifest,
    /// There are no random numbers.
    #[error("the system has no random numbers")]
    Random,
}

/// What is wrong with the bytes of an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The image ends in the middle of something.
    #[error("{wanted} bytes are needed and {left} are left")]
    Truncated {
        /// How many bytes are needed.
        wanted: u64,
        /// How many there are.
        left: u64,
    },
    /// The first bytes are not those of this kind of image.
    #[error("magic {found:#010x} instead of {expected:#010x}")]
    Magic {
        /// What is there.
        found: u32,
        /// What should be.
        expected: u32,
    },
    /// The magic belongs to no kind of image.
    #[error("magic {found:#010x} is that of no image; raw data (pages, archives) have none")]
    UnknownMagic {
        /// What is there.
        found: u32,
    },
    /// A file name that belongs to no kind of image, where the kind was to be told by it.
    #[error("no kind of image has such a file name")]
    UnknownName,
    /// This kind of image has no entries at all.
    #[error("it is raw data, without entries")]
    Raw,
    /// The image holds another number of entries than it must.
    #[error("{found} entries where {expected} must be")]
    EntryCount {
        /// How many there are.
        found: usize,
        /// How many must be.
        expected: usize,
    },
    /// A required field is not there.
    #[error("{message} without its required field {field}")]
    Required {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// A field has a value that its enum lacks.
    #[error("{value} is not a known value of {message}.{field}")]
    EnumValue {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// A field is encoded as another type.
    #[error("{message}.{field} is encoded as another type")]
    WireType {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// Bytes that are no protobuf message.
    #[error("{message} is not a protobuf message")]
    Message {
        /// Name of the message.
        message: &'static str,
    },
    /// Messages in messages, deeper than any image has them.
    #[error("messages are nested deeper than {limit}")]
    Depth {
        /// The limit.
        limit: usize,
    },
    /// The message could not be decoded for another reason.
    #[error("the message cannot be decoded")]
    Decode(#[from] prost::DecodeError),
    /// Padding after a payload is not zero, or a payload's size overflows.
    #[error("the size of the payload, {size}, is absurd")]
    PayloadSize {
        /// The size.
        size: u64,
    },
    /// A pagemap entry that cannot be.
    #[error("pages at {address:#x}: {reason}")]
    Pages {
        /// Address of the first page.
        address: u64,
        /// What is wrong with it.
        reason: PagesFault,
    },
    /// A block of packed pages that does not unpack to its pages.
    #[error("a block of {size} bytes does not unpack to {pages_size}")]
    Packed {
        /// Its size in the image.
        size: u32,
        /// The size of its pages.
        pages_size: u32,
    },
    /// A record of a stream of images is out of place.
    #[error("{0}")]
    Record(RecordFault),
    /// JSON that is not an image.
    #[error("{path}: {reason}")]
    Json {
        /// Where in the JSON.
        path: String,
        /// What is wrong there.
        reason: JsonFault,
    },
    /// Text that is not JSON.
    #[error("not JSON")]
    Text(#[from] serde_json::Error),
}

/// Why a pagemap entry cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagesFault {
    /// Neither count of pages is set, or it is zero.
    #[error("no pages")]
    Empty,
    /// The address is not that of a page.
    #[error("not at the start of a page")]
    Unaligned,
    /// The end of the entry is past the end of all addresses.
    #[error("they end past the last address")]
    Overflow,
    /// The entry begins before the one before it ends.
    #[error("they overlap the entry before")]
    Overlap,
    /// The pages image is too small for them.
    #[error("they end past the end of the pages image")]
    PagesImage,
    /// The flags contradict each other or are unknown.
    #[error("the flags contradict each other or are unknown")]
    Flags,
    /// A page that is said to be in the parent is not in any.
    #[error("no parent has the page")]
    NoParent,
    /// Blocks in an entry whose content is not in the pages image, or of no page or too many.
    #[error("blocks that cannot be: of a page at least and 4 MiB at most, and only where there is content")]
    Blocks,
    /// There are more or fewer blocks than the pages make.
    #[error("another number of blocks than the pages make")]
    BlockCount,
    /// A block is larger than what it unpacks to.
    #[error("a block larger than its pages")]
    BlockSize,
    /// The blocks' sizes do not sum up to what the entry says.
    #[error("blocks of another size than stated")]
    BlockSum,
    /// The page size is not a power of two that a kernel uses.
    #[error("an absurd page size")]
    PageSize,
}

/// What is wrong with a record of a stream of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordFault {
    /// The stream does not begin as one.
    #[error("not a stream of images, or one of another version")]
    Header,
    /// A record of an unknown type.
    #[error("a record of unknown type")]
    Type,
    /// An image is opened twice, or data belong to no open image.
    #[error("a record of an image that is not open, or opened twice")]
    Image,
    /// A name or a piece of data is larger than this format allows.
    #[error("a record larger than allowed")]
    TooLarge,
    /// The name is no file name.
    #[error("a name that no image can have")]
    Name,
    /// An image has another size than its last record says.
    #[error("an image of another size than stated")]
    Size,
    /// The stream ends before its end record, or while images are open, or their number is another.
    #[error("the stream ends early, or holds another number of images than stated")]
    End,
    /// Some byte is not what was sent.
    #[error("the sum of all bytes is another than was sent: they were changed on the way")]
    Sum,
    /// All images together are larger than the reader wants.
    #[error("more data than the reader allows")]
    Limit,
}

/// What is wrong with a value in JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonFault {
    /// A value of another type.
    #[error("{0} is wanted")]
    Wanted(&'static str),
    /// A number that the field cannot hold.
    #[error("the number does not fit")]
    Range,
    /// A word that is none of the field's.
    #[error("unknown name {0:?}")]
    Name(String),
    /// A field that the message lacks.
    #[error("{0} has no such field")]
    Field(&'static str),
    /// A required field that is not there.
    #[error("required field {0} is missing")]
    Required(&'static str),
    /// Text that is not base64.
    #[error("not base64")]
    Base64,
    /// A magic that no image has.
    #[error("no image has the magic {0:?}")]
    Magic(String),
    /// Values in values, deeper than any image has them.
    #[error("nested too deep")]
    Depth,
}

impl Error {
    /// Whether the image is simply not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
