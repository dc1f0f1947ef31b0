//! `engine_generate`: one request through the engine's service, its events handed on where the caller is.
//!
//! The engine works on its own thread; the callback runs on the caller's, so it may take its time and call
//! back into the library. The engine may be ahead of it by some tokens, which an early end discards.

use std::sync::mpsc::{Receiver, channel};

use engine::{Event, FinishReason, Finished, Request, SamplingParams, Sent, Service};

use crate::abi::{Output, Sampling, Token, TokenFn};
use crate::ffi::{ENGINE_ERR_GENERATION, Fault, Status, ffi};
use crate::handles::{self, Handle};
use crate::memory::{Buffer, array, enough, read, token_ids, write_back};

/// Generates an answer.
///
/// # Safety
/// `prompt` has `prompt_len` ids; `sampling` is NULL or a struct of its `struct_size`, its array as long as it
/// says; `output` is NULL or a writable struct of its `struct_size`, its buffers NULL or of its capacity, its
/// function NULL or one that can be called with `user_data` and does not unwind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_generate(
    e: *const Handle,
    prompt: *const i32,
    prompt_len: usize,
    sampling: *const Sampling,
    output: *mut Output,
) -> Status {
    ffi(|| {
        let service = handles::get(e)?;
        if output.is_null() {
            return Err(Fault::argument("output is NULL"));
        }
        // SAFETY: `output` is the caller's, as said above.
        let mut answer = unsafe { read(output) }?;
        (answer.finish_reason, answer.count, answer.cached_tokens) = (0, 0, 0);
        // SAFETY: `prompt` is the caller's, as said above; the reference ends on this line.
        let prompt = token_ids("prompt", unsafe { array("prompt", prompt, prompt_len) }?)?;
        // SAFETY: `sampling` is the caller's, as said above.
        let sampling = unsafe { read(sampling) }?;
        // SAFETY: its array is the caller's, as said above.
        let params = unsafe { sampling.resolve() }?;
        // SAFETY: the buffers and the function are the caller's, as said above.
        let outcome = unsafe { generate(&service, prompt, params, &mut answer) };
        // SAFETY: `output` is where `answer` was read from.
        unsafe { write_back(output, &answer) };
        outcome
    })
}

/// Checks the room, submits the request and hands on what comes of it.
///
/// # Safety
/// What `engine_generate` asks of the fields of `answer`.
unsafe fn generate(
    service: &Service,
    prompt: Vec<u32>,
    params: SamplingParams,
    answer: &mut Output,
) -> Result<(), Fault> {
    let left = service.max_model_len().saturating_sub(prompt.len());
    let needed = params.max_tokens.map_or(left, |max| max.min(left));
    // SAFETY: handed on from the caller.
    let tokens = unsafe { Buffer::new("tokens", answer.tokens, answer.capacity) }?;
    // SAFETY: handed on from the caller.
    let logprobs = unsafe { Buffer::new("logprobs", answer.logprobs, answer.capacity) }?;
    let buffered = tokens.is_some() || logprobs.is_some();
    if !buffered && answer.on_token.is_none() {
        answer.count = needed;
        return Ok(());
    }
    if buffered {
        enough(needed, answer.capacity).inspect_err(|_| answer.count = needed)?;
    }
    let (sender, events) = channel();
    let sink = move |event| match sender.send(event) {
        Ok(()) => Sent::Ok,
        Err(_) => Sent::Gone,
    };
    let id = service.submit(Request::new(prompt, params), Box::new(sink))?;
    let mut taker = Taker { tokens, logprobs, answer };
    // SAFETY: handed on from the caller.
    let end = unsafe { taker.take(&events) };
    if matches!(end, End::Unwanted) {
        service.abort(id);
    }
    end.report(service, answer)
}

/// How an answer ended.
enum End {
    /// The engine said so.
    Finished(Finished),
    /// The callback said so.
    Unwanted,
    /// The engine's thread has ended without a word.
    Lost,
}

impl End {
    fn report(self, service: &Service, answer: &mut Output) -> Result<(), Fault> {
        let finished = match self {
            Self::Finished(finished) => finished,
            Self::Unwanted => {
                answer.finish_reason = finish_reason(FinishReason::Abort);
                return Ok(());
            }
            Self::Lost => {
                answer.finish_reason = finish_reason(FinishReason::Abort);
                return Err(Fault::internal("the engine has stopped"));
            }
        };
        answer.finish_reason = finish_reason(finished.reason);
        answer.cached_tokens = finished.cached_tokens;
        match (finished.error, finished.reason) {
            (Some(why), _) => Err(Fault::new(ENGINE_ERR_GENERATION, why.to_string())),
            // Nobody but this function can abort its request: the engine has failed.
            (None, FinishReason::Abort) => {
                let why = service.status().failure;
                Err(Fault::internal(why.unwrap_or_else(|| "the engine has stopped".to_owned())))
            }
            (None, FinishReason::Stop | FinishReason::Length) => Ok(()),
        }
    }
}

/// `ENGINE_FINISH_*` of the header.
fn finish_reason(reason: FinishReason) -> i32 {
    match reason {
        FinishReason::Stop => 1,
        FinishReason::Length => 2,
        FinishReason::Abort => 3,
    }
}

/// Hands tokens to the caller's buffers and function.
struct Taker<'a> {
    tokens: Option<Buffer<i32>>,
    logprobs: Option<Buffer<f32>>,
    answer: &'a mut Output,
}

impl Taker<'_> {
    /// Takes in events up to the end of the answer.
    ///
    /// # Safety
    /// The function of `answer` can be called with its `user_data`.
    unsafe fn take(&mut self, events: &Receiver<Event>) -> End {
        for event in events {
            let token = match event {
                Event::Finished(finished) => return End::Finished(finished),
                Event::Token(token) => token,
            };
            if let Some(tokens) = &mut self.tokens {
                tokens.set(self.answer.count, token.token.cast_signed());
            }
            if let Some(logprobs) = &mut self.logprobs {
                logprobs.set(self.answer.count, token.logprob);
            }
            self.answer.count += 1;
            let Some(on_token) = self.answer.on_token else { continue };
            // SAFETY: handed on from the caller.
            if unsafe { self.call(on_token, &token) } == 0 {
                return End::Unwanted;
            }
        }
        End::Lost
    }

    /// Shows a token to the callback.
    ///
    /// # Safety
    /// `on_token` can be called with the `user_data` of `answer`.
    unsafe fn call(&self, on_token: TokenFn, token: &engine::Token) -> i32 {
        let shown = Token {
            id: token.token.cast_signed(),
            logprob: token.logprob,
            raw_logprob: token.raw_logprob,
            entropy: token.entropy,
            text: token.text.as_ptr().cast(),
            text_len: token.text.len(),
            ..Token::default()
        };
        // SAFETY: handed on from the caller; the token lives until the call returns.
        unsafe { on_token(self.answer.user_data, &shown) }
    }
}
