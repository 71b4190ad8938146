//! What programs with options have in common.

use std::process::ExitCode;

pub type Failure = Box<dyn std::error::Error>;

/// Runs a program that ends well if `run` says so. Without options help is what
/// was asked for; options that are refused are answered with `usage`.
pub fn run<O>(
    usage: &str,
    options: Result<Option<O>, Failure>,
    run: impl FnOnce(&O) -> Result<bool, Failure>,
) -> ExitCode {
    let options = match options {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{usage}");
            return ExitCode::SUCCESS;
        }
        Err(refusal) => {
            eprintln!("{refusal}\n\n{usage}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
