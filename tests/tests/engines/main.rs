//! Container engines, with our program as their `criu`: they are not to notice. A machine without one of them skips its tests.

mod runc;
