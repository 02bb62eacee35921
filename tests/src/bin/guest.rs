//! All guests in one program: `guest NAME DIR`, or `guest --list`.

fn main() {
    let mut args = std::env::args().skip(1);
    match (args.next(), args.next()) {
        (Some(list), None) if list == "--list" => {
            for guest in standstill_tests::guests::ALL {
                println!("{}", guest.name);
            }
        }
        (Some(name), Some(dir)) => standstill_tests::guests::main(&name, dir.into()),
        _ => {
            eprintln!("guest NAME DIR | guest --list");
            std::process::exit(2);
        }
    }
}
