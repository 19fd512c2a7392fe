//! Programs in the kernel: loaded with aya, run with `BPF_PROG_TEST_RUN`.

use aya::programs::{
    ProgramFd, SchedClassifier, TcAttachType, TestRun, TestRunAttrs, TestRunOptions, TestRunResult, Xdp,
    XdpMode,
};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use polc_backend_ebpf::asm::Code;
use polc_backend_ebpf::manifest::Manifest;
use polc_backend_ebpf::object::{MapDef, Object, Program, ProgramKind};
use polc_ir::entities::Map;

use cranelift_entity::PrimaryMap;

/// The name of every program here.
pub(crate) const NAME: &str = "polc";

/// A program in the kernel, with its maps.
pub(crate) struct Loaded {
    /// Maps and program.
    pub(crate) ebpf: Ebpf,
    kind: ProgramKind,
}

/// An object of one program.
pub(crate) fn object(kind: ProgramKind, maps: PrimaryMap<Map, MapDef>, code: Code) -> Object {
    let mut object = Object::new(Manifest::default());
    object.maps = maps;
    object.programs.push(Program { name: NAME.to_string(), kind, code });
    object
}

/// The end of a long message, where the verifier says what is wrong.
fn tail(text: &str) -> String {
    text[text.ceil_char_boundary(text.len().saturating_sub(400))..].to_string()
}

impl Loaded {
    /// Loads an object's first program.
    ///
    /// # Errors
    /// The object can't be written, or what the kernel says.
    pub(crate) fn load(object: &Object) -> Result<Loaded, String> {
        let bytes = object.write().map_err(|error| error.to_string())?;
        let kind = object.programs[0].kind;
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .load(&bytes)
            .map_err(|error| error.to_string())?;
        let program = ebpf.program_mut(&object.programs[0].name).ok_or("the program is missing")?;
        let loaded = match kind {
            ProgramKind::Xdp => <&mut Xdp>::try_from(&mut *program).map(Xdp::load),
            ProgramKind::Classifier => {
                <&mut SchedClassifier>::try_from(&mut *program).map(SchedClassifier::load)
            }
            ProgramKind::Netfilter => unreachable!("netfilter programs are not measured"),
        };
        loaded.and_then(|result| result).map_err(|error| tail(&format!("{error:?}")))?;
        Ok(Loaded { ebpf, kind })
    }

    /// The program's file descriptor, for tail calls.
    pub(crate) fn fd(&self) -> Result<&ProgramFd, String> {
        let program = self.ebpf.program(NAME).ok_or("the program is missing")?;
        let fd = match self.kind {
            ProgramKind::Xdp => <&Xdp>::try_from(program).and_then(Xdp::fd),
            ProgramKind::Classifier => <&SchedClassifier>::try_from(program).and_then(SchedClassifier::fd),
            ProgramKind::Netfilter => unreachable!("netfilter programs are not measured"),
        };
        fd.map_err(|error| error.to_string())
    }

    /// Instructions that the kernel's verifier processed.
    pub(crate) fn verified_insns(&self) -> u32 {
        let info = self.ebpf.program(NAME).and_then(|program| program.info().ok());
        info.and_then(|info| info.verified_instruction_count()).unwrap_or(0)
    }

    /// Bytes of machine code.
    pub(crate) fn jited_bytes(&self) -> u32 {
        let info = self.ebpf.program(NAME).and_then(|program| program.info().ok());
        info.map_or(0, |info| info.size_jitted())
    }

    /// Runs the program `repeat` times on a frame. `live` frames of that batch size go where the program sends them.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn run(
        &self,
        frame: &[u8],
        repeat: u32,
        live: Option<(u32, &[u8])>,
    ) -> Result<TestRunResult, String> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = repeat;
        if let Some((batch, context)) = live {
            options.attrs = TestRunAttrs::new().xdp_live_frames(batch);
            options.ctx_in = Some(context);
        }
        let program = self.ebpf.program(NAME).ok_or("the program is missing")?;
        let result = match self.kind {
            ProgramKind::Xdp => <&Xdp>::try_from(program).map(|program| program.test_run(options)),
            ProgramKind::Classifier => {
                <&SchedClassifier>::try_from(program).map(|program| program.test_run(options))
            }
            ProgramKind::Netfilter => unreachable!("netfilter programs are not measured"),
        };
        result.and_then(|result| result).map_err(|error| format!("{error:?}"))
    }

    /// Attaches an XDP program to a device of this thread's namespace, in the driver's own receive path.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn attach_xdp(&mut self, device: &str) -> Result<(), String> {
        let program = self.ebpf.program_mut(NAME).ok_or("the program is missing")?;
        let program: &mut Xdp = program.try_into().map_err(|error| format!("{error}"))?;
        program.attach(device, XdpMode::Driver).map_err(|error| format!("{device}: {error:?}"))?;
        Ok(())
    }

    /// Attaches a program to a device of this thread's namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn attach(&mut self, device: &str) -> Result<(), String> {
        if self.kind == ProgramKind::Xdp {
            return self.attach_xdp(device);
        }
        let program = self.ebpf.program_mut(NAME).ok_or("the program is missing")?;
        let program: &mut SchedClassifier = program.try_into().map_err(|error| format!("{error}"))?;
        program.attach(device, TcAttachType::Ingress).map_err(|error| format!("{device}: {error:?}"))?;
        Ok(())
    }
}
