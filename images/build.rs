//! Turns `proto/*.proto` into two things: the Rust types of every message, and a table of every field that the JSON form
//! and the validation of entries are driven by.
//!
//! Text in images becomes `Vec<u8>` in the Rust types: it holds names that the kernel keeps (paths, thread names,
//! mount options), and those need not be UTF-8. Only the RPC keeps `String`. On the wire there is no difference.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use protox::prost_reflect::prost_types::field_descriptor_proto::Type;
use protox::prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, ExtensionDescriptor, FieldDescriptor, Kind,
    MessageDescriptor, Value,
};

/// The file whose text stays `String`.
const TEXT_IS_UTF8: &str = "rpc.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    let folder = Path::new("proto");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    files.sort();

    let mut compiler = protox::Compiler::new([folder])?;
    compiler.include_imports(true);
    for file in &files {
        compiler.open_file(file)?;
    }

    let mut set = compiler.file_descriptor_set();
    // These only say how fields are shown.
    set.file.retain(|file| file.name() != "opts.proto" && !file.name().starts_with("google/"));
    for file in &mut set.file {
        if file.name() == TEXT_IS_UTF8 {
            continue;
        }
        for message in &mut file.message_type {
            for field in &mut message.field {
                if field.r#type() == Type::String {
                    field.set_type(Type::Bytes);
                }
            }
        }
    }
    prost_build::Config::new().enable_type_names().include_file("proto.rs").compile_fds(set)?;

    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("schema.rs"), schema(&compiler.descriptor_pool())?)?;
    Ok(())
}

/// The table of all messages and enums of our own files, as Rust source.
fn schema(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let print = pool.get_extension_by_name("criu").ok_or("opts.proto has no extension `criu`")?;
    let mut messages: Vec<MessageDescriptor> = pool
        .all_messages()
        .filter(|message| !message.full_name().starts_with("google.") && message.full_name() != "CRIU_Opts")
        .collect();
    messages.sort_by(|a, b| a.full_name().cmp(b.full_name()));
    let mut enums: Vec<EnumDescriptor> = pool.all_enums().filter(|e| !e.full_name().starts_with("google.")).collect();
    enums.sort_by(|a, b| a.full_name().cmp(b.full_name()));

    let mut text = String::new();
    writeln!(text, "pub(crate) static MESSAGES: [Message; {}] = [", messages.len())?;
    for message in &messages {
        writeln!(text, "    Message {{ name: {:?}, fields: &[", message.full_name())?;
        let mut fields: Vec<FieldDescriptor> = message.fields().collect();
        fields.sort_by_key(FieldDescriptor::number);
        for field in &fields {
            let label = match field.cardinality() {
                Cardinality::Optional => "Optional",
                Cardinality::Required => "Required",
                Cardinality::Repeated => "Repeated",
            };
            let scalar = match field.kind() {
                Kind::Message(target) => {
                    let index = messages.iter().position(|m| *m == target).ok_or("a type outside our files")?;
                    format!("Message({index})")
                }
                Kind::Enum(target) => {
                    let index = enums.iter().position(|e| *e == target).ok_or("an enum outside our files")?;
                    format!("Enum({index})")
                }
                Kind::Double | Kind::Float => return Err(format!("{}: no image has floats", field.full_name()).into()),
                Kind::Int32 => "Int32".to_owned(),
                Kind::Int64 => "Int64".to_owned(),
                Kind::Uint32 => "Uint32".to_owned(),
                Kind::Uint64 => "Uint64".to_owned(),
                Kind::Sint32 => "Sint32".to_owned(),
                Kind::Sint64 => "Sint64".to_owned(),
                Kind::Fixed32 => "Fixed32".to_owned(),
                Kind::Fixed64 => "Fixed64".to_owned(),
                Kind::Sfixed32 => "Sfixed32".to_owned(),
                Kind::Sfixed64 => "Sfixed64".to_owned(),
                Kind::Bool => "Bool".to_owned(),
                Kind::String => "Text".to_owned(),
                Kind::Bytes => "Bytes".to_owned(),
            };
            writeln!(
                text,
                "        Field {{ number: {}, name: {:?}, label: Label::{label}, kind: Kind::{scalar}, packed: {}, \
                 print: Print {{ {} }} }},",
                field.number(),
                field.name(),
                is_packed(field),
                printing(field, &print),
            )?;
        }
        writeln!(text, "    ] }},")?;
    }
    writeln!(text, "];\n\npub(crate) static ENUMS: [Enum; {}] = [", enums.len())?;
    for e in &enums {
        write!(text, "    Enum {{ name: {:?}, values: &[", e.full_name())?;
        for value in e.values() {
            write!(text, "({:?}, {}), ", value.name(), value.number())?;
        }
        writeln!(text, "] }},")?;
    }
    writeln!(text, "];")?;
    Ok(text)
}

/// Whether several values are written as one, by the option at the field.
fn is_packed(field: &FieldDescriptor) -> bool {
    let packed = |options: DynamicMessage| options.get_field_by_name("packed")?.as_bool();
    field.is_packed() || packed(field.options()).unwrap_or(false)
}

/// The fields of a `Print`, from the options at the field.
fn printing(field: &FieldDescriptor, print: &ExtensionDescriptor) -> String {
    let options: DynamicMessage = field.options();
    let shown = options.get_extension(print);
    let shown = shown.as_message();
    let flag =
        |name: &str| shown.and_then(|m| m.get_field_by_name(name)).as_deref().and_then(Value::as_bool).unwrap_or(false);
    let word = |name: &str| {
        shown.and_then(|m| m.get_field_by_name(name)).as_deref().and_then(Value::as_str).unwrap_or("").to_owned()
    };
    format!(
        "hex: {}, address: {}, dev: {}, odev: {}, flags: {:?}, dict: {:?}, conv: {:?}",
        flag("hex"),
        flag("ipadd"),
        flag("dev"),
        flag("odev"),
        word("flags"),
        word("dict"),
        word("conv"),
    )
}
