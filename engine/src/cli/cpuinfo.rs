//! `cpuinfo dump` and `cpuinfo check`: what this CPU can do, into an image, and compared with one.

use standstill_images::Images;
use tracing::error;

use crate::cpu;
use crate::error::Result;
use crate::options::Options;

/// Writes the image.
pub fn run_dump(options: &Options) -> i32 {
    match images(options).and_then(|images| cpu::dump(&images)) {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            255
        }
    }
}

/// Compares with it; all, if nothing was asked for.
pub fn run_check(options: &Options) -> i32 {
    match images(options).and_then(|images| cpu::check_all(options, &images)) {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            1
        }
    }
}

fn images(options: &Options) -> Result<Images> {
    Ok(Images::open_folder(&options.images_dir)?)
}
